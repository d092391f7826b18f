"""Every request and answer between two processes of a job, by the service that answers.

A request names its answer: ``class GetDeaths(Request[Deaths])``. It may be repeated after a broken connection, and is
then the same request. One that is refused is answered with ``Refused``, which the asking side raises. A change of
anything here is a new :data:`~lightning_gpuorch.control.handshake.PROTOCOL_VERSION`.
"""
