"""Every setting once: its default, unit and meaning, and whether it changes results."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "reader": ["Settings", "Values", "read_file", "read_settings", "settings_of"],
        "section": ["Fact", "Section", "SettingsError", "conform", "fact", "guess", "setting"],
        "sections": [
            "AutoencoderSettings",
            "DemoSettings",
            "GlobalSettings",
            "LocalSettings",
            "MachineSettings",
            "MatchingSettings",
            "NOTEBOOKS",
            "OwnSettings",
            "PRECISIONS",
            "Recipe",
            "RerankingSettings",
            "RunSettings",
            "SECTIONS",
            "SelectionSettings",
            "ShowSettings",
            "SplitSettings",
            "TRAINING_PRECISIONS",
            "TrainingSettings",
            "TuningSettings",
            "VerificationSettings",
            "all_names",
        ],
    },
)
