"""Convert ResNets into folders that `local-dir:` loads, each with a model card.

python convert_scripts/convert_resnet.py resnet18 resnet50.a1_in1k --output out/ --verify
"""

from command import main

if __name__ == "__main__":
    main("resnet", __doc__)
