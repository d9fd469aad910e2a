"""`python train.py …` is `genossm train …`."""

from genossm.cli import main

if __name__ == "__main__":
    main(verb="train")
