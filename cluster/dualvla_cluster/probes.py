"""Each prerequisite of DualVLA, used for real once: `python -m dualvla_cluster.probes NAME` prints what it found.

A probe runs in a process of its own, because what it tests may crash that process. Knows no other part of DualVLA but
the connection to Ray; raises whatever goes wrong.
"""

from __future__ import annotations

import io
import os
import sys
import tempfile
from collections.abc import Callable


def torch_device() -> str:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    left = torch.arange(6, dtype=torch.float32, device=device).reshape(2, 3)
    assert (left @ left.T).tolist() == [[5, 14], [14, 50]]
    name = torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    return f"torch {torch.__version__} on {name}"


def render() -> str:
    import numpy as np
    import sapien

    scene = sapien.Scene([sapien.physx.PhysxCpuSystem(), sapien.render.RenderSystem()])
    scene.set_ambient_light([1, 1, 1])
    material = sapien.render.RenderMaterial()
    material.base_color = [1, 0, 0, 1]
    builder = scene.create_actor_builder()
    builder.add_box_visual(half_size=[0.1, 0.1, 0.1], material=material)
    builder.set_initial_pose(sapien.Pose([1, 0, 0]))
    builder.build_kinematic()
    camera = scene.add_camera("probe", 32, 32, fovy=1.0, near=0.1, far=10.0)
    scene.update_render()
    camera.take_picture()
    picture = np.asarray(camera.get_picture("Color"))
    red, green, _, _ = picture[16, 16]
    assert red > 0.2 > green, f"the middle of a red box came out as {picture[16, 16]}"
    return f"sapien {sapien.__version__} rendered a frame"


def ray_cluster() -> str:
    import ray

    from dualvla_cluster.connect import connect

    connect(num_cpus=1)
    task = ray.remote(num_cpus=0.1)(lambda: sum([20, 22]))
    assert ray.get(task.remote()) == 42
    resources = ray.cluster_resources()
    return f"ray {ray.__version__} ran a task ({resources.get('CPU', 0):.0f} CPU, {resources.get('GPU', 0):.0f} GPU)"


def zero3_step() -> str:
    import torch

    on_gpu = torch.cuda.is_available()
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if on_gpu else "cpu")
    os.environ.setdefault("LOCAL_RANK", "0")
    import deepspeed
    import deepspeed.ops

    # Its shared-memory collectives for CPUs would be compiled here (most of a minute, needs a C++ compiler).
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    with tempfile.TemporaryDirectory() as folder:
        torch.distributed.init_process_group(
            "nccl" if on_gpu else "gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1
        )
        model = torch.nn.Linear(4, 1)
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": 3},
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 1 << 62,
        }
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
        losses = []
        for _ in range(2):
            loss = (engine(torch.ones(1, 4, device=engine.device)) - 10).square().mean()
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        torch.distributed.destroy_process_group()
    assert losses[1] < losses[0], f"the loss went from {losses[0]} to {losses[1]}"
    return f"deepspeed {deepspeed.__version__} took a ZeRO-3 step"


def video() -> str:
    import av
    import numpy as np

    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=5)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for level in range(0, 250, 50):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), level, dtype=np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with av.open(io.BytesIO(file.getvalue())) as container:
        levels = [frame.to_ndarray(format="rgb24").mean() for frame in container.decode(video=0)]
    assert np.allclose(levels, range(0, 250, 50), atol=8), f"grey levels came back as {levels}"
    return f"av {av.__version__} encoded and decoded H.264"


PROBES: dict[str, Callable[[], str]] = {
    "torch": torch_device,
    "render": render,
    "ray": ray_cluster,
    "zero3": zero3_step,
    "video": video,
}

if __name__ == "__main__":
    print(PROBES[sys.argv[1]]())
