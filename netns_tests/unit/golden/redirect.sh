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

table inet tproxyd {
	set ports {
		type inet_service
		elements = { 8080 }
	}

	set exclude_ports {
		type inet_service
		elements = { 22 }
	}

	set special4 {
		type ipv4_addr
		flags interval
		elements = { 0.0.0.0/8,
			     100.100.100.200,
			     127.0.0.0/8,
			     168.63.129.16,
			     169.254.0.0/16,
			     192.0.0.192,
			     224.0.0.0/3 }
	}

	set special6 {
		type ipv6_addr
		flags interval
		elements = { ::/96,
			     ::ffff:0.0.0.0/96,
			     64:ff9b::/104,
			     64:ff9b::6464:64c8,
			     64:ff9b::7f00:0/104,
			     64:ff9b::a83f:8110,
			     64:ff9b::a9fe:0/112,
			     64:ff9b::c000:c0,
			     64:ff9b::e000:0/99,
			     64:ff9b:1::/48,
			     2002::/24,
			     2002:6464:64c8::/48,
			     2002:7f00::/24,
			     2002:a83f:8110::/48,
			     2002:a9fe::/32,
			     2002:c000:c0::/48,
			     2002:e000::/19,
			     fd00:42::42,
			     fd00:c1::a9fe:a9fe,
			     fd00:ec2::/32,
			     fd20:ce::254,
			     fe80::/10,
			     ff00::/8 }
	}

	chain intercept {
		type filter hook prerouting priority raw; policy accept;
		iif "lo" accept comment "what this host sends to itself is never captured"
		tcp flags syn / fin,syn,rst,ack goto capture comment "opens a connection: those that exist go on"
	}

	chain capture {
		tcp dport != @ports return comment "not a captured port"
		tcp dport @exclude_ports return comment "excluded port"
		fib daddr type { broadcast, anycast, multicast } return comment "not for a relay"
		goto take comment "selected"
	}

	chain take {
		meta l4proto tcp ip daddr @special4 counter reject with tcp reset comment "loopback, link-local, metadata, multicast or mapped: never relayed (policy.allow_special)"
		meta l4proto tcp ip6 daddr @special6 counter reject with tcp reset comment "loopback, link-local, metadata, multicast or mapped: never relayed (policy.allow_special)"
		meta nfproto ipv4 meta mark set meta mark & 0xfdffffff | 0x01000000 counter accept comment "new connection: taken by the chain divert"
		meta nfproto ipv6 meta mark set meta mark & 0xfdffffff | 0x01000000 counter accept comment "new connection: taken by the chain divert"
	}

	chain divert {
		type nat hook prerouting priority dstnat - 5; policy accept;
		meta mark & 0x03000000 == 0x01000000 meta l4proto tcp redirect to :15006 comment "to our listener; before the NAT of others, which would change where it was going"
	}

	chain unmark {
		type filter hook prerouting priority dstnat + 2; policy accept;
		meta mark & 0x03000000 == 0x01000000 meta mark set meta mark & 0xfcffffff comment "the mark has done its work: nobody else is to see it"
	}
}

table inet tproxyd_guard {
	chain keep {
		type nat hook prerouting priority dstnat; policy accept;
		ct state new accept comment "changes nothing; that it is there keeps NAT at work for what a dead daemon still has to say"
	}
}

table inet tproxyd_state {
	comment "put there by tproxyd apply: stays when a daemon stops, until tproxyd revert"
}
RULESET
