"""A Config as a file would have it is read as the same Config again."""

from __future__ import annotations

import json

import pytest

from tproxyd.config import Config, config_from_mapping
from tproxyd.config.dump import config_to_mapping

CONFIGS = {
    "defaults": {},
    "everything else than the defaults": {
        "capture": {
            "ports": "all",
            "exclude_ports": [],
            "interfaces": ["eth*"],
            "sources": ["192.0.2.0/24", "2001:db8::/32"],
            "destinations": ["local", "198.51.100.7"],
            "when_down": "refuse",
        },
        "routing": {"mark": "0x1000000/0x3000000"},
        "upstream": {"target": "[2001:db8::7]:80", "source": ["127.0.0.6", "127.0.0.7"], "connect_timeout": "1500ms"},
        "relay": {"busy_poll": "10us", "workers": "auto", "idle_timeout": "0.1s"},
        "limits": {"max_connections": 100},
        "policy": {
            "allow_special": ["::ffff:192.0.2.0/120"],
            "rule": [
                {"name": "there", "ports": ["80-89"], "action": {"forward": "127.0.0.1:8080"}},
                {"name": "no", "sources": ["192.0.2.1"], "action": "refuse"},
            ],
        },
        "admin": {"socket": "", "metrics": "127.0.0.1:1"},
        "log": {"access": False},
    },
    "a Unix socket": {"upstream": {"target": "unix:/run/app.sock"}, "admin": {"socket": "/run/x.sock"}},
}


@pytest.mark.parametrize("content", CONFIGS.values(), ids=CONFIGS)
def test_what_is_told_is_read_as_the_same_again(content: dict[str, object]) -> None:
    config = config_from_mapping(content)
    told = json.loads(json.dumps(config_to_mapping(config)))
    assert config_from_mapping(told) == config
    assert set(told) == set(Config.__struct_fields__)
