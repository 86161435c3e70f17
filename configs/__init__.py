"""The configs that ship with llmjax: `--config=NAME[:SIZE]`. Installed as the package `llmjax.configs`."""
