from .connection import (
    ClusterError as ClusterError,
    check_engine as check_engine,
    connected as connected,
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
