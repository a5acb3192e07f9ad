"""The application: parameters, notebooks under papermill, the command line."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "execution": [
            "Client",
            "Engine",
            "Interrupted",
            "NotebookError",
            "Preempted",
            "execute",
            "head",
        ],
        "parameters": [
            "Declaration",
            "ParameterError",
            "chain",
            "combine",
            "conform",
            "declared",
            "is_path",
            "options",
            "own_range",
            "parse",
            "read_params",
            "select",
            "yaml_number",
        ],
        "pipeline": ["plan", "run", "run_own"],
        "summary": ["own_summary", "score_lines"],
        "train_command": ["read_parameters", "train"],
    },
)
