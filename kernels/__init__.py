"""The CUDA sources, shipped as package data of ``cuflash.kernels``. An editable install finds the folder only because this file exists."""
