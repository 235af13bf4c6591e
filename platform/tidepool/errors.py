"""Every error that Tidepool raises for a person to act on.

    TidepoolError
    ├── SpecError                   a spec that cannot be run as written
    ├── DataError                   input text or a prepared dataset that cannot be used
    ├── ModelError                  a model, tokenizer or adapter that cannot be loaded or built
    │   └── BaseMismatchError       an adapter that was trained on another base
    ├── StoreError                  the object store did not do what was asked
    │   ├── ObjectNotFoundError     no object at this key
    │   ├── ObjectExistsError       put-if-absent found one there
    │   ├── StoreAccessError        wrong, expired or missing credentials, or no permission
    │   ├── StoreFullError          no room, or a quota that is used up
    │   ├── StoreUnfitError         an endpoint that breaks a promise which commits depend on
    │   └── StoreUnreachableError   no answer within the deadline
    ├── DiskError                   a disk of this machine that is full or cannot be written
    ├── CheckpointError             no checkpoint can be written or read
    │   ├── CorruptCheckpointError  bytes that are not the ones committed
    │   └── SupersededError         another driver has taken the run over
    ├── RegistryError               a name, version or alias that does not resolve
    │   └── AliasMovedError         somebody else moved the alias first
    ├── RunError                    a training run that cannot start or go on
    │   ├── SpecChangedError        a run name in use with another spec
    │   ├── VersionSkewError        a node with other software than the driver's
    │   ├── ScriptError             a script that cannot be made resumable
    │   ├── ReplayError             a script that did not do again what it did before
    │   ├── NumericsError           a worker whose arithmetic would give other bits
    │   ├── NonFiniteError          a loss or gradient norm that is not a finite number
    │   ├── OutOfMemoryError        a worker whose device has too little memory for the spec
    │   └── WorkerLostError         workers died and the retries are used up
    ├── ApiKeyError                 a key to the API that is not there, or a log of keys that cannot be understood
    ├── RequestError                a request to the engine that it cannot serve as written
    ├── EngineBusyError             an engine whose queue is full: the same request may succeed later
    └── ClusterError                the Ray cluster does not answer or lacks what is asked

A message says what happened, where, and what to do. Each error is built from its message alone, so that it survives
pickling on its way through Ray. Errors of other libraries are mapped once, where they enter, with `from`.
"""


class TidepoolError(Exception):
    """Root of the tree in the module's docstring."""


class SpecError(TidepoolError):
    """A spec that cannot be run as written."""


class DataError(TidepoolError):
    """Input text or a prepared dataset that cannot be used."""


class ModelError(TidepoolError):
    """A model, tokenizer or adapter that cannot be loaded or built."""


class BaseMismatchError(ModelError):
    """An adapter that was trained on another base."""


class StoreError(TidepoolError):
    """The object store did not do what was asked."""


class ObjectNotFoundError(StoreError):
    """No object at this key."""


class ObjectExistsError(StoreError):
    """Put-if-absent found an object at the key."""


class StoreAccessError(StoreError):
    """Wrong, expired or missing credentials, or no permission."""


class StoreFullError(StoreError):
    """No room in the store, or a quota of it that is used up."""


class StoreUnfitError(StoreError):
    """An endpoint that breaks a promise which commits depend on (see `storage.fitness`)."""


class StoreUnreachableError(StoreError):
    """No answer from the store within the deadline."""


class DiskError(TidepoolError):
    """A disk of this machine that is full or cannot be written: the cache of models, or temporary files."""


class CheckpointError(TidepoolError):
    """No checkpoint can be written or read."""


class CorruptCheckpointError(CheckpointError):
    """Bytes in the store that are not the ones committed."""


class SupersededError(CheckpointError):
    """Another driver has claimed a later incarnation of the run."""


class RegistryError(TidepoolError):
    """A model name, version or alias that does not resolve."""


class AliasMovedError(RegistryError):
    """Somebody else moved the alias first."""


class RunError(TidepoolError):
    """A training run that cannot start or go on."""


class SpecChangedError(RunError):
    """A run name in use with another spec."""


class VersionSkewError(RunError):
    """A node whose software is not the driver's."""


class ScriptError(RunError):
    """A script under `tidepool.run` that cannot be made resumable."""


class ReplayError(RunError):
    """A script under `tidepool.run` that, started again, did not do what it did before."""


class NumericsError(RunError):
    """A worker whose arithmetic would give other bits than the run's."""


class NonFiniteError(RunError):
    """A loss or gradient norm that is not a finite number."""


class OutOfMemoryError(RunError):
    """A worker whose device has too little memory for what the spec asks for."""


class WorkerLostError(RunError):
    """Workers died and the retries are used up."""


class ApiKeyError(TidepoolError):
    """A key to the API that is not there or cannot be made, or a log of keys that cannot be understood."""


class RequestError(TidepoolError):
    """A request to the engine that it cannot serve as written."""


class EngineBusyError(TidepoolError):
    """An engine whose queue is full: the same request may succeed later."""


class ClusterError(TidepoolError):
    """The Ray cluster does not answer or lacks what is asked."""
