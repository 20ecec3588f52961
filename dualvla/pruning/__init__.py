"""Dual-layer pruning (Sec. 3.2.1 of the paper): keep the reasoning of a frame only where scene and action both change.

Knows numpy; never Ray. `action_labels` is Eq. 4, `FrameDifferences` a scene label that needs no training,
`combine` puts the two together.
"""

from dualvla.pruning.events import FrameDifferences, SceneEventDetector
from dualvla.pruning.kinematics import POSE_DIMS, action_labels, action_labels_ragged, motion_changes
from dualvla.pruning.masks import MODES, Mode, combine

__all__ = [
    "MODES",
    "POSE_DIMS",
    "FrameDifferences",
    "Mode",
    "SceneEventDetector",
    "action_labels",
    "action_labels_ragged",
    "combine",
    "motion_changes",
]
