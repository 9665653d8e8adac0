"""Whether the kernels compute on this card what they should: before they serve, and in doctor.

``python -m veneer_server.backends.cuda.self_test`` runs it in a process of its own, which a
kernel that goes astray may end. `cases` has the kernels with small shapes, `report` the answer.
"""
