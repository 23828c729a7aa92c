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

ip -4 route add local default dev lo table 133 proto 133
ip -6 route add local default dev lo table 133 proto 133
ip -4 rule add priority 5235 fwmark 0x2000000/0x3000000 iif lo unreachable protocol 133
ip -4 rule add priority 5233 fwmark 0x2000000/0x3000000 iif lo lookup 133 protocol 133
ip -4 rule add priority 5233 fwmark 0x1000000/0x3000000 iif lo goto 5235 protocol 133
ip -4 rule add priority 5234 fwmark 0x1000000/0x3000000 lookup 133 protocol 133
ip -6 rule add priority 5235 fwmark 0x2000000/0x3000000 iif lo unreachable protocol 133
ip -6 rule add priority 5233 fwmark 0x2000000/0x3000000 iif lo lookup 133 protocol 133
ip -6 rule add priority 5233 fwmark 0x1000000/0x3000000 iif lo goto 5235 protocol 133
ip -6 rule add priority 5234 fwmark 0x1000000/0x3000000 lookup 133 protocol 133

nft -f - <<'RULESET'
table inet tproxyd
delete table inet tproxyd
table inet tproxyd_guard
delete table inet tproxyd_guard
table inet tproxyd_state
delete table inet tproxyd_state

table inet tproxyd {
	set legs4 {
		type ipv4_addr . inet_service . ipv4_addr . inet_service
		size 262144
		flags dynamic,timeout
	}

	set ended4 {
		type ipv4_addr . inet_service . ipv4_addr . inet_service
		size 131072
		flags dynamic,timeout
	}

	set legs6 {
		type ipv6_addr . inet_service . ipv6_addr . inet_service
		size 262144
		flags dynamic,timeout
	}

	set ended6 {
		type ipv6_addr . inet_service . ipv6_addr . inet_service
		size 131072
		flags dynamic,timeout
	}

	set dials {
		typeof @th,0,32
		size 32768
		flags dynamic,timeout
	}

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
		meta l4proto udp accept comment "only TCP is captured, and ICMP errors about it"
		tcp dport != @ports tcp sport != @ports accept comment "no captured port on either side: no connection of ours"
		tcp flags syn / fin,syn,rst,ack goto capture comment "opens a connection; before any socket match, which would find TIME_WAIT sockets"
		socket transparent 1 goto relayed comment "a socket of ours, unless it is a listener on every address"
	}

	chain relayed {
		socket wildcard 1 accept comment "a listener on every address is not a connection of ours"
		meta mark set meta mark & 0xfdffffff | 0x01000000 notrack accept comment "connection of ours, either side, or an ICMP error about one: deliver here, whatever its destination"
	}

	chain cookie {
		type filter hook prerouting priority dstnat + 5; policy accept;
		iif "lo" accept comment "what this host sends to itself is never captured"
		meta mark & 0x03000000 == 0x01000000 accept comment "belongs to a connection of ours"
		tcp flags ack / fin,syn,rst,ack tcp dport @ports fib daddr type local goto capture comment "may answer a SYN cookie of our listener; established connections of others pass tproxy"
	}

	chain capture {
		tcp dport != @ports return comment "not a captured port"
		tcp dport @exclude_ports return comment "excluded port"
		fib daddr type { broadcast, anycast, multicast } return comment "not for a relay"
		goto take comment "selected"
	}

	chain take {
		tcp flags syn / fin,syn,rst,ack ip daddr @special4 meta nfproto ipv4 meta l4proto tcp tproxy ip to 127.0.0.1:15006 counter reject with tcp reset comment "loopback, link-local, metadata, multicast or mapped: never relayed (policy.allow_special)"
		tcp flags syn / fin,syn,rst,ack ip6 daddr @special6 meta nfproto ipv6 meta l4proto tcp tproxy ip6 to [::1]:15006 counter reject with tcp reset comment "loopback, link-local, metadata, multicast or mapped: never relayed (policy.allow_special)"
		meta nfproto ipv4 meta l4proto tcp tproxy ip to 127.0.0.1:15006 meta mark set meta mark & 0xfdffffff | 0x01000000 counter notrack accept comment "new connection: to our listener; no listener: this rule breaks off here"
		meta nfproto ipv6 meta l4proto tcp tproxy ip6 to [::1]:15006 meta mark set meta mark & 0xfdffffff | 0x01000000 counter notrack accept comment "new connection: to our listener; no listener: this rule breaks off here"
		tcp flags syn / fin,syn,rst,ack ip saddr . tcp sport . ip daddr . tcp dport @legs4 counter drop comment "the client's new port is the one of a connection of ours to the app, in its name: it tries again in a second"
		tcp flags syn / fin,syn,rst,ack ip6 saddr . tcp sport . ip6 daddr . tcp dport @legs6 counter drop comment "the client's new port is the one of a connection of ours to the app, in its name: it tries again in a second"
	}

	chain stray {
		type filter hook forward priority raw; policy accept;
		meta mark & 0x03000000 == 0x01000000 counter drop comment "steered, but our ip rule or route is missing: not to its destination, which would reset it"
	}

	chain untrack {
		type route hook output priority raw; policy accept;
		meta l4proto != tcp goto errors comment "only TCP is captured, and ICMP errors about it"
		tcp dport != @ports tcp sport != @ports accept comment "no captured port on either side: no connection of ours"
		oif "lo" goto loopback comment "to a local app, and its answers"
		socket transparent 1 notrack accept comment "sent by a socket of ours: no conntrack entry"
		tcp flags fin,rst ip daddr . tcp dport . ip saddr . tcp sport @legs4 update @legs4 { ip daddr . tcp dport . ip saddr . tcp sport timeout 10s } update @ended4 { ip daddr . tcp dport . ip saddr . tcp sport timeout 10s } comment "the app ends our connection: soon forgotten"
		tcp flags fin,rst ip6 daddr . tcp dport . ip6 saddr . tcp sport @legs6 update @legs6 { ip6 daddr . tcp dport . ip6 saddr . tcp sport timeout 10s } update @ended6 { ip6 daddr . tcp dport . ip6 saddr . tcp sport timeout 10s } comment "the app ends our connection: soon forgotten"
		tcp flags syn ip daddr . tcp dport . ip saddr . tcp sport @ended4 delete @legs4 { ip daddr . tcp dport . ip saddr . tcp sport } accept comment "the client has this connection itself, past us: ours with its ports has ended"
		ip daddr . tcp dport . ip saddr . tcp sport @legs4 meta mark set meta mark & 0xfeffffff | 0x02000000 notrack accept comment "answer of a local app to a client whose address our connection bears: back to us, no conntrack entry"
		tcp flags syn ip6 daddr . tcp dport . ip6 saddr . tcp sport @ended6 delete @legs6 { ip6 daddr . tcp dport . ip6 saddr . tcp sport } accept comment "the client has this connection itself, past us: ours with its ports has ended"
		ip6 daddr . tcp dport . ip6 saddr . tcp sport @legs6 meta mark set meta mark & 0xfeffffff | 0x02000000 notrack accept comment "answer of a local app to a client whose address our connection bears: back to us, no conntrack entry"
	}

	chain loopback {
		tcp flags fin,rst ip daddr . tcp dport . ip saddr . tcp sport @legs4 update @legs4 { ip daddr . tcp dport . ip saddr . tcp sport timeout 10s } update @ended4 { ip daddr . tcp dport . ip saddr . tcp sport timeout 10s } comment "the app ends our connection: soon forgotten"
		tcp flags fin,rst ip6 daddr . tcp dport . ip6 saddr . tcp sport @legs6 update @legs6 { ip6 daddr . tcp dport . ip6 saddr . tcp sport timeout 10s } update @ended6 { ip6 daddr . tcp dport . ip6 saddr . tcp sport timeout 10s } comment "the app ends our connection: soon forgotten"
		socket transparent 1 goto sent comment "our connection to a local app"
		ip daddr . tcp dport . ip saddr . tcp sport @legs4 notrack accept comment "answer of a local app to our connection: no conntrack entry"
		ip6 daddr . tcp dport . ip6 saddr . tcp sport @legs6 notrack accept comment "answer of a local app to our connection: no conntrack entry"
	}

	chain sent {
		tcp flags syn / fin,syn,rst,ack update @dials { @th,0,32 timeout 2s } comment "its ports: an ICMP error about it is for us, too"
		tcp flags syn delete @ended4 { ip saddr . tcp sport . ip daddr . tcp dport } update @legs4 { ip saddr . tcp sport . ip daddr . tcp dport timeout 7s } notrack accept comment "begins; a connection that had these ports before is over"
		tcp flags syn delete @ended6 { ip6 saddr . tcp sport . ip6 daddr . tcp dport } update @legs6 { ip6 saddr . tcp sport . ip6 daddr . tcp dport timeout 7s } notrack accept comment "begins; a connection that had these ports before is over"
		tcp flags rst update @ended4 { ip saddr . tcp sport . ip daddr . tcp dport timeout 10s } update @legs4 { ip saddr . tcp sport . ip daddr . tcp dport timeout 10s } notrack accept comment "we break it off: soon forgotten"
		tcp flags rst update @ended6 { ip6 saddr . tcp sport . ip6 daddr . tcp dport timeout 10s } update @legs6 { ip6 saddr . tcp sport . ip6 daddr . tcp dport timeout 10s } notrack accept comment "we break it off: soon forgotten"
		ip saddr . tcp sport . ip daddr . tcp dport @ended4 add @legs4 { ip saddr . tcp sport . ip daddr . tcp dport timeout 2m30s } notrack accept comment "the app has ended its direction: entered again where it has left"
		ip6 saddr . tcp sport . ip6 daddr . tcp dport @ended6 add @legs6 { ip6 saddr . tcp sport . ip6 daddr . tcp dport timeout 2m30s } notrack accept comment "the app has ended its direction: entered again where it has left"
		update @legs4 { ip saddr . tcp sport . ip daddr . tcp dport timeout 2m30s } notrack accept comment "remembered for the app's answers"
		update @legs6 { ip6 saddr . tcp sport . ip6 daddr . tcp dport timeout 2m30s } notrack accept comment "remembered for the app's answers"
		notrack accept comment "a set is full: not remembered"
	}

	chain errors {
		icmp type destination-unreachable @th,136,8 6 @th,224,32 @dials meta mark set meta mark & 0xfeffffff | 0x02000000 notrack comment "about a SYN of ours to a local app, which bears another address: back to us"
		icmpv6 type destination-unreachable @th,112,8 6 @th,384,32 @dials meta mark set meta mark & 0xfeffffff | 0x02000000 notrack comment "about a SYN of ours to a local app, which bears another address: back to us"
	}
}

table inet tproxyd_state {
	comment "put there by tproxyd apply: stays when a daemon stops, until tproxyd revert"
}
RULESET
