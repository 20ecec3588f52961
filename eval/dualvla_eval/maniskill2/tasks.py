"""The tasks of the originals that suites of ours evaluate, as frozen data. Knows names and step limits only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dualvla_eval.maniskill2.interpreter import Package
from dualvla_eval.maniskill2.robots import GOOGLE_ROBOT, PANDA, WIDOWX, OriginalRobot

MANISKILL2 = "maniskill2"
WIDOWX_SUITE = "maniskill2-simpler-widowx"
GOOGLE_SUITE = "maniskill2-simpler-google"


@dataclass(frozen=True)
class OriginalTask:
    """id: what the original calls it. says: the instruction where the original has none; {target} is the target's
    phrase, {goal} a point in the base frame. target, reference: names of the original's actors (None: as it tells).
    about: what the task is about where that is no object. assets: folders under MS2_ASSET_DIR, which the original's
    own `python -m mani_skill2.utils.download_asset` fetches.
    """

    name: str
    id: str
    max_steps: int
    episodes: int
    says: str = ""
    target: str | None = None
    reference: str | None = None
    about: str = ""
    phrases: Mapping[str, str] = field(default_factory=dict)
    assets: tuple[str, ...] = ()

    def instruct(self, target: str, goal: Sequence[float] | None) -> str:
        at = "" if goal is None else "x {:.3f}, y {:.3f}, z {:.3f} m".format(*goal)
        return self.says.format(target=target, goal=at)


@dataclass(frozen=True)
class OriginalSuite:
    """package: whose tasks they are, by the name it is imported by. termination: of `dualvla_eval.conventions`."""

    package: Package
    robot: OriginalRobot
    control_hz: float
    termination: str
    tasks: tuple[OriginalTask, ...]


def _panda(name: str, id: str, says: str, **more: object) -> OriginalTask:
    return OriginalTask(name, id, max_steps=200, episodes=100, says=says, **more)  # type: ignore[arg-type]


def _simpler(name: str, max_steps: int, episodes: int, about: str = "") -> OriginalTask:
    return OriginalTask(name, name, max_steps, episodes, about=about)


_HOLD = "pick up the {target} and hold it at {goal}"

SUITES: Mapping[str, OriginalSuite] = {
    MANISKILL2: OriginalSuite(
        "mani_skill2",
        PANDA,
        20.0,
        "first_success",
        (
            _panda("lift_cube", "LiftCube-v0", "lift the {target}", target="cube", phrases={"cube": "red cube"}),
            _panda("pick_cube", "PickCube-v0", _HOLD, target="cube", phrases={"cube": "red cube"}),
            _panda(
                "stack_cube",
                "StackCube-v0",
                "stack the {target} on the green cube",
                target="cubeA",
                reference="cubeB",
                phrases={"cubeA": "red cube", "cubeB": "green cube"},
            ),
            _panda("peg_insertion_side", "PegInsertionSide-v0", "insert the {target} into the hole", target="peg"),
            _panda("plug_charger", "PlugCharger-v0", "plug the {target} into the receptacle", target="charger"),
            _panda("pick_single_ycb", "PickSingleYCB-v0", _HOLD, assets=("mani_skill2_ycb",)),
            _panda("pick_single_egad", "PickSingleEGAD-v0", _HOLD, assets=("mani_skill2_egad",)),
            _panda("pick_clutter_ycb", "PickClutterYCB-v0", _HOLD, assets=("mani_skill2_ycb", "pick_clutter")),
            _panda(
                "assembling_kits", "AssemblingKits-v0", "put the {target} into the kit", assets=("assembling_kits",)
            ),
            _panda(
                "turn_faucet",
                "TurnFaucet-v0",
                "turn the handle of the faucet",
                about="faucet",
                assets=("partnet_mobility/dataset",),
            ),
        ),
    ),
    WIDOWX_SUITE: OriginalSuite(
        "simpler_env",
        WIDOWX,
        5.0,
        "original",
        (
            _simpler("widowx_spoon_on_towel", 60, 24),
            _simpler("widowx_carrot_on_plate", 60, 24),
            _simpler("widowx_stack_cube", 60, 24),
            _simpler("widowx_put_eggplant_in_basket", 120, 24),
        ),
    ),
    GOOGLE_SUITE: OriginalSuite(
        "simpler_env",
        GOOGLE_ROBOT,
        3.0,
        "original",
        (
            _simpler("google_robot_pick_coke_can", 80, 75),
            _simpler("google_robot_move_near", 80, 60),
            _simpler("google_robot_open_drawer", 113, 27, about="drawer"),
            _simpler("google_robot_close_drawer", 113, 27, about="drawer"),
            _simpler("google_robot_place_apple_in_closed_top_drawer", 200, 27, about="apple"),
        ),
    ),
}
