"""One process of the jobs with phases in test_exactness.py: phases_worker.py OUT SETTINGS RUN:STOP,STOP...

It trains each RUN up to each STOP in turn, as so many starts of `llmjax train` do; starting processes takes most of the
time of so small a model. SETTINGS is the JSON of fields and values.
"""

import json
import sys

from etils import epath


def main(out: str, settings: str, *runs: str) -> None:
    from llmjax.cli.logs import configure_logging
    from llmjax.parallel import hosts
    from llmjax.run import config as run_config

    hosts.initialize()
    from llmjax.train import loop

    configure_logging()
    fields = [(field, str(value)) for field, value in json.loads(settings).items()]
    for run in runs:
        name, _, stops = run.partition(":")
        for stop in stops.split(","):
            config = run_config.resolve("quickstart", [*fields, ("train.stop_at", stop)])
            status = loop.train(config, epath.Path(out) / name)
            assert status == loop.SUCCESS


if __name__ == "__main__":
    main(*sys.argv[1:])
