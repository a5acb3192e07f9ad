from .executed import (
    fingerprints as fingerprints,
    is_unchanged as is_unchanged,
    record_path as record_path,
    write_record as write_record,
)
from .execution import (
    Client as Client,
    Engine as Engine,
    Interrupted as Interrupted,
    NotebookError as NotebookError,
    Preempted as Preempted,
    execute as execute,
    head as head,
)
from .layout import lay_out as lay_out
from .pipeline import (
    Declaration as Declaration,
    chain as chain,
    declared as declared,
    injected as injected,
    plan as plan,
    run as run,
    run_own as run_own,
    select as select,
    settings_in as settings_in,
    takes as takes,
)
from .summary import own_summary as own_summary, score_lines as score_lines
from .train_command import read_notebook_settings as read_notebook_settings, train as train
