"""CONTA's numbers and files: from photos with tags to masks and a segmenter, no server needed.

Rooms, lowest first: `errors`, `records`, `config`, `seeding`, `observe`, `store`, `workers`;
`data`, `housekeeping`; `models`; then side by side `causal`, `seeds`, `expansion`, `training`,
`evaluation`; `stages` on top, the only place where files meet numbers.
"""

import os

# OpenMP's threads wait for each other in a loop that burns the core the others need as soon as
# anything else runs on the machine: a training step then takes ten times as long. With a shorter
# loop before they sleep it takes twice as long, and a sixth longer on a quiet machine. It has to be
# said before torch is imported; what the user has set wins.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")

# By torch's own choice a convolution on CUDA rounds fp32 to 10 bits (TF32). Keys say fp32 and hold
# no device, so fp32 it is; who wants speed has `runtime.precision: amp`, which keys know. NVIDIA's
# libraries read this when they are loaded, in ranks and workers too.
os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")
