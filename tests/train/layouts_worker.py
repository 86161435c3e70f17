"""One process of the jobs in test_exactness.py: layouts_worker.py OUT CORPUS STORE MESH... trains on these of LAYOUTS.

One job trains on several meshes, since starting processes takes most of the time.
"""

import sys

from etils import epath

from tests import jobs

# Large enough that XLA splits matrix products between threads: with other numbers of threads, bits on data8 differ.
LARGE = {"model.embed": 256, "model.mlp": 512, "data.seq_len": 256, "train.loss_chunk": 256}
# Every mesh shape of README.md and docs/, for 8 devices.
LAYOUTS = {
    "data8": LARGE,
    "data2_fsdp2_tensor2": {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2},
    "pmap": {**LARGE, "parallel.backend": "pmap"},
    "fsdp8": {**LARGE, "mesh.data": 1, "mesh.fsdp": 8},
    "data2_fsdp4": {"mesh.data": 2, "mesh.fsdp": 4},
    "data2_tensor4": {"mesh.data": 2, "mesh.tensor": 4},
}
SETTINGS = {
    **jobs.TINY,
    "model.num_layers": 1,
    "train.steps": 3,
    "train.loss_chunk": 64,
    "train.compilation_cache": "off",
    "data.split.validation": 0.0,  # no evaluation: it is another program to compile
}


def main(out: str, corpus: str, store: str, *names: str) -> None:
    from llmjax.parallel import hosts
    from llmjax.run import config as run_config

    hosts.initialize()
    from llmjax.train import loop

    shared = {"data.store": store, "data.sources.main.path": f"{corpus}/*.txt"}
    for name in names:
        settings = {**SETTINGS, **shared, **LAYOUTS[name]}
        config = run_config.resolve(
            str(jobs.ROOT / "configs" / "quickstart.py"), [(field, str(value)) for field, value in settings.items()]
        )
        status = loop.train(config, epath.Path(out) / name)
        assert status == loop.SUCCESS


if __name__ == "__main__":
    main(*sys.argv[1:])
