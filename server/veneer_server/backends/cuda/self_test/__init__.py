"""Checks that the kernels compute the right results on this GPU, before serving and in doctor.

``python -m veneer_server.backends.cuda.self_test`` runs it in a separate process, since a
faulty kernel may end the process. `cases` runs the kernels on small shapes; `report` collects
the results.
"""
