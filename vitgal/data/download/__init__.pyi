from .checks import Report as Report, check as check
from .sources import (
    RemoteFile as RemoteFile,
    Source as Source,
    list_sources as list_sources,
    read_sources as read_sources,
    source_of as source_of,
)
from .transfer import download as download
