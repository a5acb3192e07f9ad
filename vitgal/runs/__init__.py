"""Run folders: files and locks, manifests and their fingerprints, reuse and refusal of stages."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "environment": ["commit", "versions"],
        "errors": ["StageError", "UserError", "abbreviate"],
        "files": [
            "TEMPORARY",
            "atomic",
            "disk_full",
            "plain",
            "read_json",
            "write_array",
            "write_arrays",
            "write_json",
            "write_text",
        ],
        "fingerprints": ["CHUNK", "fingerprint", "fingerprint_file", "fingerprint_images"],
        "inputs": ["Input", "combined_input", "file_input", "images_input", "input_fingerprints"],
        "locks": ["ALONE", "LOCK", "WorkerSlot", "disown_locks", "locked"],
        "manifest": [
            "MANIFEST",
            "STAGE_FORMAT",
            "STARTED",
            "differences",
            "output_fingerprint",
            "read_stage",
        ],
        "paths": [
            "SMALL_WEIGHTS",
            "checkout",
            "data_folder",
            "model_file",
            "resolve",
            "run_folder",
        ],
        "stage_folder": ["Stage", "stage"],
    },
)
