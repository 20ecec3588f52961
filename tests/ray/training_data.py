"""A synthetic data set in the schema of contract.md: enough to train on, made in milliseconds."""

import numpy as np

from dualvla.io import dataset, manifest

TEXTS = ("move to the red cube. touch it. move left", "move to the blue ball. touch it. move right")


def write_training_data(folder: str, episodes: int = 4, steps: int = 6, questions: int = 8, **changes: object) -> str:
    """`changes` replaces columns of every row, as in `control_hz=10.0`."""
    rng = np.random.default_rng(7)

    def row(**values: object) -> dict:
        image = rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)
        common = {"timestamp_s": 0.0, "control_hz": 5.0, "split": "train", "events": []}
        return {**common, "images": [("main", dataset.encode_png(image))], **values, **changes}

    rows = [
        row(
            episode_id=f"robot/{e:04d}", step=s, domain="robot", task="touch", instruction="touch the red cube",
            ee_pose=rng.normal(size=6), gripper=[1.0], proprio=rng.normal(size=4).astype(np.float32),
            action=rng.normal(size=7).astype(np.float32), action_space="ee_delta_pose+gripper",
            motion_primitive="move left", reasoning=TEXTS[s % 2],
            target_pixel=rng.random(2).astype(np.float32), target_position=rng.random(3).astype(np.float32),
        )
        for e in range(episodes)
        for s in range(steps)
    ]  # fmt: skip
    rows += [
        row(
            episode_id=f"qa/{q:04d}", step=0, domain="multimodal", task="colour",
            instruction="what colour is the cube?", reasoning="red" if q % 2 else "blue",
        )
        for q in range(questions)
    ]  # fmt: skip
    manifest.begin(folder, dataset.KIND, {}, {})
    dataset.write_table(dataset.part_url(folder, 0), dataset.rows_to_table(rows))
    dataset.finish_dataset(folder, {}, {}, rows_in=len(rows))
    return folder
