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
            "chain",
            "declared",
            "injected",
            "select",
            "settings_in",
            "takes",
        ],
        "pipeline": ["plan", "run", "run_own"],
        "summary": ["own_summary", "score_lines"],
        "train_command": ["read_notebook_settings", "train"],
    },
)
