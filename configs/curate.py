"""From raw text to a corpus: clean, judge, deduplicate, decontaminate, remove personal data, split.

llmjax curate --config=curate --workdir=runs/web --config.curate.inputs.web.path='crawl/*.warc.gz'
llmjax prepare --config=quickstart --workdir=runs/mine \
    --config.data.sources.web.path='runs/web/curated/*.jsonl.zst' --config.data.sources.web.split_field=split
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Every stage with its defaults, which suit prose and documentation in any language; `llmjax fields curate` says
    more. Without an input of your own it reads the sources of Python's standard library, to show what happens."""
    c = ConfigDict()
    c.curate = dict(
        inputs=dict(python=dict(path="stdlib:", licence="PSF-2.0")),
        stages=(
            "read",
            "extract",
            "normalise",
            "language",
            "quality",
            "duplicates",
            "decontaminate",
            "personal_data",
            "sample",
            "split",
        ),
        # Languages that stay, such as ("en", "de"); none named: all do.
        language=dict(keep=()),
        quality=dict(rules=("gopher", "repetition", "c4", "fineweb")),
        duplicates=dict(similarity=0.6),
        # Files of the sets that models will be evaluated on.
        decontaminate=dict(against=()),
        personal_data=dict(action="replace"),
        split=dict(validation=0.05, test=0.05),
    )
    return c
