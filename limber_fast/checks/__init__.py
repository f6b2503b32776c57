"""The wording of every argument error: op, argument, contract, found, remedy. ValueError for shape and value,
TypeError for dtype and kind. One module per op, over what they share."""

from limber_fast.checks.cache import *  # noqa: F403
from limber_fast.checks.evaluation import *  # noqa: F403
from limber_fast.checks.frozen_cross_entropy import *  # noqa: F403
from limber_fast.checks.general import *  # noqa: F403
from limber_fast.checks.gptj import *  # noqa: F403
from limber_fast.checks.info_nce import *  # noqa: F403
from limber_fast.checks.int8_linear import *  # noqa: F403
from limber_fast.checks.prefix_attention import *  # noqa: F403
from limber_fast.checks.project_concat import *  # noqa: F403
