"""What other packages need before they are loaded."""

import os

# With AMX, OpenVINO 2026.4.1 gives wrong results for int8 networks of few channels (12 to 48; one image of 40 × 40:
# error 0.6; without AMX 3e-7, as of ONNX Runtime). Its copy of oneDNN reads this once.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_VNNI")
