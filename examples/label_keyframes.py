"""Where would DualVLA keep reasoning in *your* episode? Needs only arrays: end-effector poses and gripper openings.

Eq. 4 of the paper gives the action label; here the scene label comes from two hand-marked events. Run it as it is.
"""

import numpy as np

from dualvla.pruning import action_labels, combine

# A 4 s reach-grasp-lift at 5 Hz: poses [x, y, z (m), rx, ry, rz (rad, extrinsic XYZ Euler)], gripper 1 open, 0 closed.
steps = 20
pose = np.zeros((steps, 6))
pose[:, 0] = np.interp(np.arange(steps), [0, 7, 20], [0.30, 0.45, 0.45])  # forward, then stop
pose[:, 2] = np.interp(np.arange(steps), [0, 7, 11, 13, 20], [0.20, 0.20, 0.05, 0.05, 0.20])  # down, hold, up
gripper = np.where(np.arange(steps) < 12, 1.0, 0.0)

action = action_labels(pose, gripper)
scene = np.zeros(steps, dtype=bool)
scene[[7, 8, 12, 13]] = True

keep = combine(scene, action, mode="both")
for name, labels in (("action", action), ("scene", scene), ("keep", keep)):
    print(f"{name:>6} {''.join('#' if label else '.' for label in labels)}  {labels.mean():.0%} of frames")
