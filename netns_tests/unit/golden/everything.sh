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

ip -4 route add local default dev lo table 4294967295 proto 133
ip -6 route add local default dev lo table 4294967295 proto 133
ip -4 rule add priority 32765 fwmark 0x20/0x30 iif lo unreachable protocol 133
ip -4 rule add priority 32763 fwmark 0x20/0x30 iif lo lookup 4294967295 protocol 133
ip -4 rule add priority 32763 fwmark 0x10/0x30 iif lo goto 32765 protocol 133
ip -4 rule add priority 32764 fwmark 0x10/0x30 lookup 4294967295 protocol 133
ip -6 rule add priority 32765 fwmark 0x20/0x30 iif lo unreachable protocol 133
ip -6 rule add priority 32763 fwmark 0x20/0x30 iif lo lookup 4294967295 protocol 133
ip -6 rule add priority 32763 fwmark 0x10/0x30 iif lo goto 32765 protocol 133
ip -6 rule add priority 32764 fwmark 0x10/0x30 lookup 4294967295 protocol 133

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

	set ports {
		type inet_service
		flags interval
		elements = { 1,
			     8080,
			     9000-9099,
			     65000-65535 }
	}

	set exclude_ports {
		type inet_service
		elements = { 22,
			     9005 }
	}

	set interfaces {
		type ifname
		flags interval
		elements = { "eth0",
			     "eth1",
			     "wg*" }
	}

	set exclude_interfaces {
		type ifname
		flags interval
		elements = { "br-*",
			     "lo" }
	}

	set sources4 {
		type ipv4_addr
		flags interval
		elements = { 192.0.2.0/24,
			     198.51.100.7 }
	}

	set sources6 {
		type ipv6_addr
		flags interval
		elements = { 2001:db8:1::/64 }
	}

	set exclude_sources4 {
		type ipv4_addr
		flags interval
		elements = { 192.0.2.3 }
	}

	set exclude_sources6 {
		type ipv6_addr
		flags interval
		elements = { 2001:db8:1::3 }
	}

	set destinations4 {
		type ipv4_addr
		flags interval
		elements = { 203.0.113.0/24 }
	}

	set destinations6 {
		type ipv6_addr
		flags interval
		elements = { 2001:db8:f::/48 }
	}

	set exclude_destinations4 {
		type ipv4_addr
		flags interval
		elements = { 203.0.113.7 }
	}

	set exclude_destinations6 {
		type ipv6_addr
		flags interval
		elements = { 2001:db8:f::7 }
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

	set allow_special4 {
		type ipv4_addr
		flags interval
		elements = { 169.254.169.254 }
	}

	set allow_special6 {
		type ipv6_addr
		flags interval
		elements = { fd00:ec2::254 }
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
		meta mark set meta mark & 0xffffffdf | 0x00000010 notrack accept comment "connection of ours, either side, or an ICMP error about one: deliver here, whatever its destination"
	}

	chain cookie {
		type filter hook prerouting priority dstnat + 5; policy accept;
		iif "lo" accept comment "what this host sends to itself is never captured"
		meta mark & 0x00000030 == 0x00000010 accept comment "belongs to a connection of ours"
		tcp flags ack / fin,syn,rst,ack tcp dport @ports fib daddr type local goto capture comment "may answer a SYN cookie of our listener; established connections of others pass tproxy"
	}

	chain capture {
		tcp dport != @ports return comment "not a captured port"
		tcp dport @exclude_ports return comment "excluded port"
		iifname != @interfaces return comment "not a captured interface"
		iifname @exclude_interfaces return comment "excluded interface"
		fib daddr type { broadcast, anycast, multicast } return comment "not for a relay"
		ip saddr != @sources4 return comment "not a captured source"
		ip6 saddr != @sources6 return comment "not a captured source"
		ip saddr @exclude_sources4 return comment "excluded source"
		ip6 saddr @exclude_sources6 return comment "excluded source"
		ip daddr @exclude_destinations4 return comment "excluded destination"
		ip6 daddr @exclude_destinations6 return comment "excluded destination"
		ip daddr @destinations4 goto take comment "captured destination"
		ip6 daddr @destinations6 goto take comment "captured destination"
		fib daddr type local goto take comment "an address of this namespace"
	}

	chain take {
		tcp flags syn / fin,syn,rst,ack ip daddr @special4 ip daddr != @allow_special4 meta nfproto ipv4 meta l4proto tcp tproxy ip to 127.0.0.1:15099 counter reject with tcp reset comment "loopback, link-local, metadata, multicast or mapped: never relayed (policy.allow_special)"
		tcp flags syn / fin,syn,rst,ack ip6 daddr @special6 ip6 daddr != @allow_special6 meta nfproto ipv6 meta l4proto tcp tproxy ip6 to [::1]:15099 counter reject with tcp reset comment "loopback, link-local, metadata, multicast or mapped: never relayed (policy.allow_special)"
		meta nfproto ipv4 meta l4proto tcp tproxy ip to 127.0.0.1:15099 meta mark set meta mark & 0xffffffdf | 0x00000010 counter notrack accept comment "new connection: to our listener; no listener: this rule breaks off here"
		meta nfproto ipv6 meta l4proto tcp tproxy ip6 to [::1]:15099 meta mark set meta mark & 0xffffffdf | 0x00000010 counter notrack accept comment "new connection: to our listener; no listener: this rule breaks off here"
	}

	chain stray {
		type filter hook forward priority raw; policy accept;
		meta mark & 0x00000030 == 0x00000010 counter drop comment "steered, but our ip rule or route is missing: not to its destination, which would reset it"
	}

	chain untrack {
		type filter hook output priority raw; policy accept;
		meta l4proto != tcp accept comment "only TCP is captured"
		tcp dport != @ports tcp sport != @ports accept comment "no captured port on either side: no connection of ours"
		oif "lo" goto loopback comment "to a local app, and its answers"
		socket transparent 1 notrack accept comment "sent by a socket of ours: no conntrack entry"
	}

	chain loopback {
		tcp flags fin,rst ip daddr . tcp dport . ip saddr . tcp sport @legs4 update @legs4 { ip daddr . tcp dport . ip saddr . tcp sport timeout 10s } update @ended4 { ip daddr . tcp dport . ip saddr . tcp sport timeout 10s } comment "the app ends our connection: soon forgotten"
		tcp flags fin,rst ip6 daddr . tcp dport . ip6 saddr . tcp sport @legs6 update @legs6 { ip6 daddr . tcp dport . ip6 saddr . tcp sport timeout 10s } update @ended6 { ip6 daddr . tcp dport . ip6 saddr . tcp sport timeout 10s } comment "the app ends our connection: soon forgotten"
		socket transparent 1 goto sent comment "our connection to a local app"
		ip daddr . tcp dport . ip saddr . tcp sport @legs4 notrack accept comment "answer of a local app to our connection: no conntrack entry"
		ip6 daddr . tcp dport . ip6 saddr . tcp sport @legs6 notrack accept comment "answer of a local app to our connection: no conntrack entry"
	}

	chain sent {
		tcp flags syn delete @ended4 { ip saddr . tcp sport . ip daddr . tcp dport } update @legs4 { ip saddr . tcp sport . ip daddr . tcp dport timeout 3s } notrack accept comment "begins; a connection that had these ports before is over"
		tcp flags syn delete @ended6 { ip6 saddr . tcp sport . ip6 daddr . tcp dport } update @legs6 { ip6 saddr . tcp sport . ip6 daddr . tcp dport timeout 3s } notrack accept comment "begins; a connection that had these ports before is over"
		tcp flags rst update @ended4 { ip saddr . tcp sport . ip daddr . tcp dport timeout 10s } update @legs4 { ip saddr . tcp sport . ip daddr . tcp dport timeout 10s } notrack accept comment "we break it off: soon forgotten"
		tcp flags rst update @ended6 { ip6 saddr . tcp sport . ip6 daddr . tcp dport timeout 10s } update @legs6 { ip6 saddr . tcp sport . ip6 daddr . tcp dport timeout 10s } notrack accept comment "we break it off: soon forgotten"
		ip saddr . tcp sport . ip daddr . tcp dport @ended4 add @legs4 { ip saddr . tcp sport . ip daddr . tcp dport timeout 2m30s } notrack accept comment "the app has ended its direction: entered again where it has left"
		ip6 saddr . tcp sport . ip6 daddr . tcp dport @ended6 add @legs6 { ip6 saddr . tcp sport . ip6 daddr . tcp dport timeout 2m30s } notrack accept comment "the app has ended its direction: entered again where it has left"
		update @legs4 { ip saddr . tcp sport . ip daddr . tcp dport timeout 2m30s } notrack accept comment "remembered for the app's answers"
		update @legs6 { ip6 saddr . tcp sport . ip6 daddr . tcp dport timeout 2m30s } notrack accept comment "remembered for the app's answers"
		notrack accept comment "a set is full: not remembered"
	}
}

table inet tproxyd_guard {
	set ports {
		type inet_service
		flags interval
		elements = { 1,
			     8080,
			     9000-9099,
			     65000-65535 }
	}

	set exclude_ports {
		type inet_service
		elements = { 22,
			     9005 }
	}

	set interfaces {
		type ifname
		flags interval
		elements = { "eth0",
			     "eth1",
			     "wg*" }
	}

	set exclude_interfaces {
		type ifname
		flags interval
		elements = { "br-*",
			     "lo" }
	}

	set sources4 {
		type ipv4_addr
		flags interval
		elements = { 192.0.2.0/24,
			     198.51.100.7 }
	}

	set sources6 {
		type ipv6_addr
		flags interval
		elements = { 2001:db8:1::/64 }
	}

	set exclude_sources4 {
		type ipv4_addr
		flags interval
		elements = { 192.0.2.3 }
	}

	set exclude_sources6 {
		type ipv6_addr
		flags interval
		elements = { 2001:db8:1::3 }
	}

	set destinations4 {
		type ipv4_addr
		flags interval
		elements = { 203.0.113.0/24 }
	}

	set destinations6 {
		type ipv6_addr
		flags interval
		elements = { 2001:db8:f::/48 }
	}

	set exclude_destinations4 {
		type ipv4_addr
		flags interval
		elements = { 203.0.113.7 }
	}

	set exclude_destinations6 {
		type ipv6_addr
		flags interval
		elements = { 2001:db8:f::7 }
	}

	chain guard {
		type filter hook prerouting priority raw + 1; policy accept;
		iif "lo" accept comment "what this host sends to itself is never captured"
		meta mark & 0x00000030 == 0x00000010 accept comment "the daemon has taken it"
		tcp flags syn / fin,syn,rst,ack goto capture comment "connections that exist go on"
	}

	chain capture {
		tcp dport != @ports return comment "not a captured port"
		tcp dport @exclude_ports return comment "excluded port"
		iifname != @interfaces return comment "not a captured interface"
		iifname @exclude_interfaces return comment "excluded interface"
		fib daddr type { broadcast, anycast, multicast } return comment "not for a relay"
		ip saddr != @sources4 return comment "not a captured source"
		ip6 saddr != @sources6 return comment "not a captured source"
		ip saddr @exclude_sources4 return comment "excluded source"
		ip6 saddr @exclude_sources6 return comment "excluded source"
		ip daddr @exclude_destinations4 return comment "excluded destination"
		ip6 daddr @exclude_destinations6 return comment "excluded destination"
		ip daddr @destinations4 goto take comment "captured destination"
		ip6 daddr @destinations6 goto take comment "captured destination"
		fib daddr type local goto take comment "an address of this namespace"
	}

	chain take {
		meta l4proto tcp counter reject with tcp reset comment "selected, but no daemon took it: refused at once (when_down)"
	}

	chain defragment {
		meta nfproto ipv4 meta l4proto tcp tproxy ip to 127.0.0.1:15099 comment "never reached; that it is there makes the kernel put fragments together first, so that a SYN in two pieces is seen"
		meta nfproto ipv6 meta l4proto tcp tproxy ip6 to [::1]:15099 comment "never reached; that it is there makes the kernel put fragments together first, so that a SYN in two pieces is seen"
	}
}

table inet tproxyd_state {
	comment "put there by tproxyd apply: stays when a daemon stops, until tproxyd revert"
}
RULESET
