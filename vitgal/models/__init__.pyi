from .backbones import (
    Backbone as Backbone,
    BackboneFeatures as BackboneFeatures,
    generalised_mean as generalised_mean,
)
from .checkpoint_files import read_checkpoint as read_checkpoint, use_tensors as use_tensors
from .describers import (
    Describer as Describer,
    InputFacts as InputFacts,
    TimmDescriber as TimmDescriber,
    open_timm as open_timm,
)
from .descriptors import (
    describe as describe,
    extract_global as extract_global,
    extract_local as extract_local,
    require_codes as require_codes,
    rescale as rescale,
    token_scores as token_scores,
)
from .heads import ArcFace as ArcFace, LinearClassifier as LinearClassifier
from .hub import HubError as HubError, HubModel as HubModel
from .inference import (
    BatchLimit as BatchLimit,
    batches as batches,
    device_of as device_of,
    limited_threads as limited_threads,
    network_input as network_input,
    normalise as normalise,
    open_model as open_model,
    pick_device as pick_device,
    resolve_precision as resolve_precision,
)
from .layouts import (
    Layout as Layout,
    fill as fill,
    make_layout as make_layout,
    refuse_misfits as refuse_misfits,
)
from .local_extractors import (
    LocalExtractor as LocalExtractor,
    RootSift as RootSift,
    XFeat as XFeat,
    make_extractor as make_extractor,
)
from .network import (
    Autoencoder as Autoencoder,
    MultiAtrous as MultiAtrous,
    TimmBackbone as TimmBackbone,
    TokenCodes as TokenCodes,
    TokenFeatures as TokenFeatures,
    ViTGaL as ViTGaL,
    build_model as build_model,
    class_attention as class_attention,
    outline as outline,
    seeded as seeded,
)
from .prepared import is_prepared as is_prepared, keep_memory as keep_memory, prepare as prepare
from .sources import (
    NetworkError as NetworkError,
    TimmSource as TimmSource,
    baseline_network as baseline_network,
    read_configuration as read_configuration,
    sized as sized,
    weights_fingerprint as weights_fingerprint,
    weights_input as weights_input,
)
from .teacher import Teacher as Teacher
from .timm_networks import (
    efficientnet_names as efficientnet_names,
    open_network as open_network,
)
from .token_network import TokenNetwork as TokenNetwork, local_network as local_network
from .weights import (
    convert as convert,
    initial_weights as initial_weights,
    load_model as load_model,
    load_outline as load_outline,
    save_model as save_model,
)
