"""A program in place of `llmjax train`: it writes evaluations whose loss is its parameter, and saves on SIGTERM.

python -m tests.sweep.fake_train WORKDIR LOSS [SECONDS_BETWEEN_EVALUATIONS]
"""

import json
import pathlib
import signal
import sys
import time


def main() -> None:
    workdir, loss, pause = pathlib.Path(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(85))
    with (workdir / "starts").open("a") as file:
        file.write("start\n")
    if loss > 100:
        print("llmjax: error: model.embed=7: must be even")
        sys.exit(78)
    (workdir / "run.json").write_text(json.dumps({"starts": [{"time": 0.0, "seconds": 3.0}]}))
    for step in (1, 2, 3):
        path = workdir / "eval" / str(step) / "validation.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps({"total": {"loss": loss + 1 / step, "accuracy": 0.5}}))
        partial.replace(path)
        time.sleep(pause)


if __name__ == "__main__":
    main()
