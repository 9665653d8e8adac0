"""The server's configuration: one frozen record, each setting declared once, checked once.

The fields of `ServerConfig` are the only list of settings. Each is a command line flag, a key
of a TOML ``--config`` file and a ``VENEER_*`` variable. The flag takes precedence, then the
variable, then the file.
"""

from veneer_server.config.kinds import Address
from veneer_server.config.load import load_config
from veneer_server.config.record import OPTIONS, ServerConfig
from veneer_server.config.setting import ConfigInvalid, Option

__all__ = ["OPTIONS", "Address", "ConfigInvalid", "Option", "ServerConfig", "load_config"]
