from .connection import (
    ClusterError as ClusterError,
    connected as connected,
    import_ray as import_ray,
    parallel as parallel,
)
from .devices import (
    check_device as check_device,
    find_gpu as find_gpu,
    one_blas_thread as one_blas_thread,
)
from .pipeline import (
    ActorPlan as ActorPlan,
    Pipeline as Pipeline,
    call_remotely as call_remotely,
    node_resources as node_resources,
)
