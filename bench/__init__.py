"""Speed, memory and host cost of cuflash and of its peers, measured in one run on one GPU: ``python -m bench --help``."""
