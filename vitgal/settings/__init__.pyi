from .reader import (
    Settings as Settings,
    Values as Values,
    read_file as read_file,
    read_settings as read_settings,
    settings_of as settings_of,
)
from .refinement import STEPS as STEPS, Step as Step, read_chain as read_chain
from .section import (
    AbsentError as AbsentError,
    Fact as Fact,
    Section as Section,
    SettingsError as SettingsError,
    conform as conform,
    fact as fact,
    guess as guess,
    setting as setting,
)
from .sections import (
    LOCAL_METHODS as LOCAL_METHODS,
    NOTEBOOKS as NOTEBOOKS,
    POOLINGS as POOLINGS,
    PRECISIONS as PRECISIONS,
    SECTIONS as SECTIONS,
    DemoSettings as DemoSettings,
    GlobalSettings as GlobalSettings,
    LocalSettings as LocalSettings,
    MachineSettings as MachineSettings,
    MatchingSettings as MatchingSettings,
    OwnSettings as OwnSettings,
    RerankingSettings as RerankingSettings,
    RunSettings as RunSettings,
    SelectionSettings as SelectionSettings,
    ShowSettings as ShowSettings,
    SplitSettings as SplitSettings,
    TuningSettings as TuningSettings,
    VerificationSettings as VerificationSettings,
    all_names as all_names,
)
from .training import (
    TRAINING_PRECISIONS as TRAINING_PRECISIONS,
    AutoencoderSettings as AutoencoderSettings,
    Recipe as Recipe,
    TrainingSettings as TrainingSettings,
)
