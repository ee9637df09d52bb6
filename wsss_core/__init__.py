"""CONTA's numbers and files: from photos with tags to masks and a segmenter, no server needed.

Rooms, lowest first: `errors`, `records`, `config`, `seeding`, `observe`, `store`; `data`; `models`;
then side by side `causal`, `seeds`, `expansion`, `training`, `evaluation`; `stages` on top, the
only place where files meet numbers.
"""
