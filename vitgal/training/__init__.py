"""Training: recipe, augmentation, samples, and the loop."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "augmentation": [
            "adjust_contrast",
            "adjust_hue",
            "adjust_saturation",
            "augment_fast",
            "augment_published",
            "cut_hole",
            "displayable",
            "draw_hole",
            "network_input",
            "rand_augment",
            "squash",
        ],
        "diagnostics": [
            "epoch_table",
            "lost_variance",
            "parameter_table",
            "same_backbone",
            "schedule_table",
            "token_maps",
            "validation_photographs",
        ],
        "distillation": ["DistilledNetwork", "disagreement"],
        "errors": ["Preempted", "TrainingError"],
        "checkpoints": ["Checkpoints", "Progress"],
        "launch": ["Fit", "run_fit"],
        "loop": ["Trainer", "training_precision"],
        "memory": ["check_batch_size", "fitting_batch"],
        "networks": ["AutoencoderNetwork", "RetrievalNetwork", "build_optimizer"],
        "schedule": ["learning_rates"],
        "samples": ["Batches", "Sample", "SplitData", "TrainingImages", "read_data"],
    },
)
