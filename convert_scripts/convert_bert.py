"""Convert BERTs of the hub, or of folders, into folders that `local-dir:` loads.

    python convert_scripts/convert_bert.py bert-base-uncased --task fill-mask --output out/
    python convert_scripts/convert_bert.py local-dir:my-bert --task text-classification

The tokenizer's files and a model card go along.
"""

from command import main

if __name__ == "__main__":
    main("bert", __doc__)
