"""CONTA's numbers and files: from photos with tags to masks and a segmenter, no server needed.

Rooms, lowest first: `errors`, `records`, `config`, `seeding`, `observe`, `store`; `data`; `models`;
then side by side `causal`, `seeds`, `expansion`, `training`, `evaluation`; `stages` on top, the
only place where files meet numbers.
"""

import os

# OpenMP's threads wait in a loop that burns the core which the thread they wait for needs, as soon
# as anything else runs on the machine: a training step then takes ten times as long. It has to be
# said before torch is imported; what the user has set wins.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
