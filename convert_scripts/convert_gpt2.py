"""Convert GPT-2s of the hub, or of folders, into folders that `local-dir:` loads.

    python convert_scripts/convert_gpt2.py distilgpt2 --output out/
    python convert_scripts/convert_gpt2.py gpt2-xl --quantize 4 --upload-repo me/gpt2-xl-4bit

The tokenizer's files and a model card go along.
"""

from command import main

if __name__ == "__main__":
    main("gpt2", __doc__)
