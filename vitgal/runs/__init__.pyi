from .environment import commit as commit, versions as versions
from .errors import (
    PathError as PathError,
    StageError as StageError,
    UserError as UserError,
    abbreviate as abbreviate,
    printable as printable,
    short as short,
)
from .files import (
    TEMPORARY as TEMPORARY,
    atomic as atomic,
    conforms as conforms,
    disk_full as disk_full,
    explained_full_disk as explained_full_disk,
    inside as inside,
    plain as plain,
    read_json as read_json,
    read_lines as read_lines,
    refuse_links as refuse_links,
    refuse_outside as refuse_outside,
    text_encoding as text_encoding,
    write_array as write_array,
    write_arrays as write_arrays,
    write_json as write_json,
    write_text as write_text,
)
from .inputs import (
    CHUNK as CHUNK,
    Input as Input,
    combined_input as combined_input,
    file_input as file_input,
    fingerprint as fingerprint,
    fingerprint_file as fingerprint_file,
    fingerprint_images as fingerprint_images,
    images_input as images_input,
    images_stamp as images_stamp,
    input_fingerprints as input_fingerprints,
    threaded as threaded,
)
from .locks import (
    ALONE as ALONE,
    LOCK as LOCK,
    WorkerSlot as WorkerSlot,
    disown_locks as disown_locks,
    locked as locked,
    waiting as waiting,
)
from .lookup import MANY as MANY, file_facts as file_facts
from .manifest import (
    MANIFEST as MANIFEST,
    STAGE_FORMAT as STAGE_FORMAT,
    STARTED as STARTED,
    differences as differences,
    output_fingerprint as output_fingerprint,
    read_record as read_record,
    read_settings as read_settings,
    read_stage as read_stage,
)
from .paths import (
    NETWORKS as NETWORKS,
    PARTS as PARTS,
    SMALL_WEIGHTS as SMALL_WEIGHTS,
    TIMM as TIMM,
    UNTRAINED as UNTRAINED,
    bundled_folder as bundled_folder,
    checkout as checkout,
    data_folder as data_folder,
    has_trained as has_trained,
    model_file as model_file,
    resolve as resolve,
    resolve_source as resolve_source,
    run_folder as run_folder,
    split_source as split_source,
    weights_path as weights_path,
)
from .stage_folder import Stage as Stage, stage as stage
