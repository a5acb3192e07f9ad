from . import store as store
from .codes import CodeError as CodeError, Codes as Codes, Moments as Moments
from .descriptors import read_descriptors as read_descriptors
from .feature_file import FeatureFile as FeatureFile
from .foreign import DescriptorError as DescriptorError
from .interchange import (
    export_hloc as export_hloc,
    export_published as export_published,
    import_published as import_published,
)
from .local import LocalFeatures as LocalFeatures
from .reconstruction import (
    VerifiedMatches as VerifiedMatches,
    export_colmap as export_colmap,
    export_hloc_matches as export_hloc_matches,
    export_kapture as export_kapture,
)
