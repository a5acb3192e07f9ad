from .augmentation import (
    adjust_contrast as adjust_contrast,
    adjust_hue as adjust_hue,
    adjust_saturation as adjust_saturation,
    augment_fast as augment_fast,
    augment_published as augment_published,
    cut_hole as cut_hole,
    displayable as displayable,
    draw_hole as draw_hole,
    network_input as network_input,
    rand_augment as rand_augment,
    scaled_hole as scaled_hole,
)
from .checkpoints import Checkpoints as Checkpoints, Progress as Progress
from .code_losses import (
    contrast as contrast,
    second_view as second_view,
    spread as spread,
)
from .diagnostics import (
    epoch_table as epoch_table,
    lost_variance as lost_variance,
    parameter_table as parameter_table,
    photograph_tokens as photograph_tokens,
    same_backbone as same_backbone,
    schedule_table as schedule_table,
    token_maps as token_maps,
    validation_photographs as validation_photographs,
)
from .errors import Preempted as Preempted, TrainingError as TrainingError
from .fit import Fit as Fit
from .launch import run_fit as run_fit
from .loop import Trainer as Trainer, training_precision as training_precision
from .memory import check_batch_size as check_batch_size
from .networks import (
    AutoencoderNetwork as AutoencoderNetwork,
    DistilledNetwork as DistilledNetwork,
    RetrievalNetwork as RetrievalNetwork,
    build_optimizer as build_optimizer,
    disagreement as disagreement,
    learning_rates as learning_rates,
)
from .samples import (
    Batches as Batches,
    Sample as Sample,
    SplitData as SplitData,
    TrainingImages as TrainingImages,
    read_data as read_data,
)
from .trackers import open_trackers as open_trackers
