#!/bin/sh
# Makes the kernel hold what `tproxyd apply` makes it hold. Run as root. Unlike apply it removes and adds again what is there
# already, so packets of live connections may get lost, and be sent again, while it runs.
set -eu

# What is tproxyd's already, whichever configuration put it there: rules and routes by their protocol, tables by their name.
for family in -4 -6; do
    ip $family rule flush protocol 133 2>/dev/null || :  # a kernel without this family has none
    ip $family route show table all proto 133 2>/dev/null | while read -r route; do
        case $route in "local default "*) ip $family route del $route ;; esac
    done
done
nft list tables inet | while read -r _ _ name; do
    case $name in tproxyd_*) nft delete table inet "$name" ;; esac
done



nft -f - <<'RULESET'
table inet tproxyd
delete table inet tproxyd
table inet tproxyd_guard
delete table inet tproxyd_guard
table inet tproxyd_state
delete table inet tproxyd_state

RULESET
