"""`python -m apportion` is `apportion`."""

from apportion.studies.cli import main

if __name__ == "__main__":
    main()
