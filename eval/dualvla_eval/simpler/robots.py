"""Both robots as SimplerEnv sets them up: joints, drives, fingers. Plain data, without a simulator."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from dualvla_eval.simpler.motion import MotionLimits


@dataclass(frozen=True)
class Drives:
    """Per joint: stiffness, damping, force limit."""

    stiffness: tuple[float, ...]
    damping: tuple[float, ...]
    force_limit: tuple[float, ...]

    def scaled(self, factor: float) -> Drives:
        """All of them by `factor`."""
        parts = (self.stiffness, self.damping, self.force_limit)
        return Drives(*(tuple(factor * value for value in part) for part in parts))


@dataclass(frozen=True)
class RobotSpec:
    """files: version -> URDF. tool: the link whose pose is commanded.

    materials: link -> (friction, radius of the contact patch in m). collision_groups: link -> the four words of SAPIEN.
    """

    files: Mapping[str, str]
    tool: str
    arm_joints: tuple[str, ...]
    arm_drives: Drives
    finger_joints: tuple[str, ...]
    finger_drives: Drives
    materials: Mapping[str, tuple[float, float]]
    collision_groups: Mapping[str, tuple[int, int, int, int]] = field(default_factory=dict)


WIDOWX = RobotSpec(
    files={"": "wx250s.urdf"},
    tool="ee_gripper_link",
    arm_joints=("waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate"),
    arm_drives=Drives(
        stiffness=(
            1169.7891719504198,
            730.0,
            808.4601346394447,
            1229.1299089624076,
            1272.2760456418862,
            1056.3326605132252,
        ),
        damping=(330.0, 180.0, 152.12036565582588, 309.6215302722146, 201.04998711007383, 269.51458932695414),
        force_limit=(200.0, 200.0, 100.0, 100.0, 100.0, 100.0),
    ),
    finger_joints=("left_finger", "right_finger"),
    finger_drives=Drives((1000.0, 1000.0), (200.0, 200.0), (60.0, 60.0)),
    materials={"left_finger_link": (2.0, 0.01), "right_finger_link": (2.0, 0.01)},
    # The fingers slide inside the bar.
    collision_groups={
        "gripper_bar_link": (1, 1, 0b11, 0),
        "left_finger_link": (1, 1, 0b01, 0),
        "right_finger_link": (1, 1, 0b10, 0),
    },
)
WIDOWX_OPENING_M = (0.014, 0.038)  # where the gripper's commands -1 and +1 send each finger

_GOOGLE_FILE = "google_robot_meta_sim_fix_wheel_fix_fingertip"
GOOGLE_RECOLORED = (
    "recolor_tabletop_visual_matching_1",
    "recolor_tabletop_visual_matching_2",
    "recolor_cabinet_visual_matching_1",
)
_GRIPPING = (2.0, 0.1)
_NAIL = (0.1, 0.01)
_FINGER_PARTS = tuple(f"link_finger{part}_{side}" for part in ("", "_tip", "_nail") for side in ("left", "right"))
GOOGLE_ROBOT = RobotSpec(
    files={
        "": f"{_GOOGLE_FILE}.urdf",
        **{version: f"{_GOOGLE_FILE}_{version}.urdf" for version in GOOGLE_RECOLORED},
    },
    tool="link_gripper_tcp",
    # The head belongs to the arm's controller: nothing moves it.
    arm_joints=(
        "joint_torso",
        "joint_shoulder",
        "joint_bicep",
        "joint_elbow",
        "joint_forearm",
        "joint_wrist",
        "joint_gripper",
        "joint_head_pan",
        "joint_head_tilt",
    ),
    arm_drives=Drives(
        stiffness=(
            1700.0,
            1737.0471680861954,
            979.975871856535,
            930.0,
            1212.154500274304,
            432.96500923932535,
            468.0013365498738,
            2000.0,
            2000.0,
        ),
        damping=(
            1059.9791902443303,
            1010.4720585373592,
            767.2803161582076,
            680.0,
            674.9946964336588,
            274.613381336198,
            340.532560578637,
            900.0,
            900.0,
        ),
        force_limit=(300.0, 300.0, *(100.0,) * 7),
    ),
    finger_joints=("joint_finger_right", "joint_finger_left"),
    finger_drives=Drives((200.0, 200.0), (8.0, 8.0), (60.0, 60.0)),
    materials={part: _NAIL if "nail" in part else _GRIPPING for part in _FINGER_PARTS},
)
GOOGLE_ARM_MOTION = MotionLimits(speed=1.5, acceleration=2.0, jerk=50.0)
GOOGLE_FINGER_MOTION = MotionLimits(speed=1.0, acceleration=7.0, jerk=50.0)
GOOGLE_FINGER_STEP_RAD = 1.31  # what a gripper action of 1 adds to the goal
GOOGLE_FINGER_MARGIN_RAD = 0.01  # how far beyond the joint's limits a goal may lie
GOOGLE_FINGER_REPEAT_RAD = 1e-3  # a change below repeats the last goal
