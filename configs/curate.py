"""From raw text to a corpus: extract, normalise, filter, deduplicate, decontaminate, replace personal data, split.

llmjax curate --config=curate --workdir=runs/web --config.curate.inputs.web.path='crawl/*.warc.gz'
llmjax prepare --config=quickstart --workdir=runs/mine \\
    --config.data.sources.web.path='runs/web/curated/*.jsonl.zst' --config.data.sources.web.split_field=split
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """All stages with their defaults, for prose and documentation in any language; see `llmjax fields curate`.

    Without an input of your own it reads the source files of Python's standard library, as a demonstration.
    """
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
        # Languages to keep, such as ("en", "de"); empty: all.
        language=dict(keep=()),
        quality=dict(rules=("gopher", "repetition", "c4", "fineweb")),
        duplicates=dict(similarity=0.6),
        # Files of the evaluation sets.
        decontaminate=dict(against=()),
        personal_data=dict(action="replace"),
        split=dict(validation=0.05, test=0.05),
    )
    return c
