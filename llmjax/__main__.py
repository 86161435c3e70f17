"""`python -m llmjax`."""

from llmjax.cli.main import main

if __name__ == "__main__":
    main()
