//! The way to the hub: its broker and the registries.

use std::net::IpAddr;

use super::{quoted, unless_failed};
use crate::doctor::facts::{Broker, Connect, Facts, Handshake, RegistryAnswer, Tried};
use crate::doctor::finding::{Check, CheckId};

const NOT_CONFIGURED: &str = "not tried: the configuration says where the hub is";

pub(super) fn resolve(facts: &Facts) -> Check {
    let id = CheckId::HubResolve;
    let hub = &facts.hub;
    let Some(Broker { host, .. }) = &hub.broker else {
        return Check::info(id, NOT_CONFIGURED);
    };
    if host.parse::<IpAddr>().is_ok() {
        return Check::ok(id, format!("{host} is an address"));
    }
    let fix = resolve_fix(facts, host);
    let silent = "no nameserver answers: ip route shows whether there is a way, cat /etc/resolv.conf whom it asks";
    let works = format!("{host} is {}", hub.addresses.join(", "));
    match &hub.resolve {
        Tried::TimedOut(seconds) => Check::error(
            id,
            format!("no nameserver answered within {seconds} s for {host}"),
            format!("{silent}; or {}", by_hand(facts, host)),
        ),
        // EAI_AGAIN (getaddrinfo(3)).
        Tried::Fails(why) if why.contains("Temporary failure") && facts.hub.nameservers > 0 => {
            let fix = format!("{silent}; or {}", by_hand(facts, host));
            Check::error(id, format!("{host} has no address: {why}"), fix)
        }
        tried @ (Tried::Works | Tried::Fails(_) | Tried::Skipped(_)) => {
            unless_failed(id, tried, &works, &fix).unwrap_or_else(|why| {
                Check::error(id, format!("{host} has no address: {why}"), fix)
            })
        }
    }
}

fn by_hand(facts: &Facts, host: &str) -> String {
    let config = quoted(&facts.config.path);
    format!("echo 'ADDRESS {host}' >> /etc/hosts, or the hub's address in `broker` in {config}")
}

fn resolve_fix(facts: &Facts, host: &str) -> String {
    let by_hand = by_hand(facts, host);
    if facts.hub.nameservers == 0 {
        return format!(
            "/etc/resolv.conf names no nameserver: echo 'nameserver ADDRESS' >> /etc/resolv.conf (by DHCP as a rule: networkctl, nmcli); or {by_hand}"
        );
    }
    if host.ends_with(".local") {
        return format!(
            "names in .local need multicast DNS: apt-get install libnss-mdns; or {by_hand}"
        );
    }
    format!("ask the nameserver: getent hosts {host}; is the name spelled right? Else {by_hand}")
}

pub(super) fn connect(facts: &Facts) -> Check {
    let id = CheckId::HubConnect;
    let hub = &facts.hub;
    let Some(broker) = &hub.broker else {
        return Check::info(id, NOT_CONFIGURED);
    };
    let Broker { host, port, .. } = broker;
    match &hub.connect {
        Connect::NotTried => Check::info(id, "not tried: see hub.resolve"),
        Connect::Connected { address, ms } => Check::ok(id, format!("{address} in {ms} ms")),
        Connect::Refused => Check::error(
            id,
            format!("{host}:{port} is there, but nobody listens"),
            format!(
                "on the hub: systemctl start foreshore-hub, and in its hub.toml below [broker] the line `listen = \"0.0.0.0:{port}\"`, since the default listens for the hub's own machine only"
            ),
        ),
        Connect::Silent => Check::error(
            id,
            format!(
                "{host}:{port} does not answer within 5 s: it is off, elsewhere, or a firewall drops what is sent to it"
            ),
            format!(
                "ping {host}; on the hub let TCP port {port} in: ufw allow {port}/tcp, or nft add rule inet filter input tcp dport {port} accept"
            ),
        ),
        Connect::NoRoute => Check::error(
            id,
            format!("there is no way to {host}:{port}"),
            "bring the network up: ip -br addr and ip route show what is there; a default route is: ip route add default via GATEWAY",
        ),
        Connect::Failed(why) => Check::error(
            id,
            format!("{host}:{port} cannot be reached: {why}"),
            format!(
                "look at the network (ip -br addr; ip route) and at the hub: nc -vz {host} {port}"
            ),
        ),
    }
}

pub(super) fn tls(facts: &Facts) -> Check {
    let id = CheckId::HubTls;
    let config = quoted(&facts.config.path);
    let Some(Broker { host, port, tls }) = &facts.hub.broker else {
        return Check::info(id, NOT_CONFIGURED);
    };
    if !tls {
        return Check::hint(
            id,
            "not used: the join token and everything else can be read on the way",
            format!(
                "in a network that you do not trust: TLS before the broker, and in {config} `broker = \"mqtts://{host}:8883\"`"
            ),
        );
    }
    let what = format!("{host}:{port}");
    let (found, fix) = match &facts.hub.tls {
        Handshake::NotTried => return Check::info(id, "not tried: see hub.connect"),
        Handshake::Verified(version) => {
            return Check::ok(id, format!("{version}, the certificate is good"));
        }
        Handshake::NoRoots(why) => (
            format!("no certificates to trust: {why}"),
            format!(
                "apt-get install ca-certificates, or in {config} below [hub] the line `ca_file = \"/etc/foreshore/hub-ca.pem\"` with the certificate of whoever signed the hub's"
            ),
        ),
        Handshake::UnknownIssuer => (
            format!("{what} shows a certificate of an unknown issuer"),
            format!(
                "copy the certificate of its issuer to /etc/foreshore/hub-ca.pem, and in {config} below [hub] the line `ca_file = \"/etc/foreshore/hub-ca.pem\"`"
            ),
        ),
        Handshake::Expired if clock_is_wrong(facts) => clock_first("expired"),
        Handshake::NotYetValid if clock_is_wrong(facts) => clock_first("not yet valid"),
        Handshake::Expired => (
            format!("the certificate of {what} has expired"),
            format!(
                "renew it on the hub; its dates: openssl s_client -connect {what} </dev/null | openssl x509 -noout -dates; this device says it is: date -u"
            ),
        ),
        Handshake::NotYetValid => (
            format!(
                "the certificate of {what} is not valid yet: this device's clock is behind, or the one it was made with is ahead"
            ),
            format!(
                "compare: date -u; openssl s_client -connect {what} </dev/null | openssl x509 -noout -dates; then set the clock that is wrong: timedatectl set-ntp true"
            ),
        ),
        Handshake::OtherName => (
            format!("the certificate of {what} is for another name"),
            format!(
                "in {config} write `broker` with the name that is in the certificate (openssl s_client -connect {what} </dev/null | openssl x509 -noout -ext subjectAltName), or have one made for {host}"
            ),
        ),
        Handshake::NotTls => (
            format!("what answers at {what} does not speak TLS"),
            format!(
                "in {config} write the port that does (8883 as a rule), or `broker = \"mqtt://{what}\"` in a network that you trust"
            ),
        ),
        Handshake::Silent => (
            format!("{what} does not answer the TLS handshake within 5 s"),
            format!(
                "try it by hand: openssl s_client -connect {what}; is it the broker that listens there?"
            ),
        ),
        Handshake::Failed(why) => (
            format!("the TLS handshake with {what} failed: {why}"),
            format!("try it by hand: openssl s_client -connect {what}"),
        ),
    };
    Check::error(id, found, fix)
}

const fn clock_is_wrong(facts: &Facts) -> bool {
    facts.clock.unix_s < facts.clock.earliest_s
}

fn clock_first(what: &str) -> (String, String) {
    (
        format!("the certificate seems {what}, since this device's clock is wrong"),
        "set the clock first: see clock.wall".to_owned(),
    )
}

pub(super) fn registries(facts: &Facts) -> Check {
    let id = CheckId::RegistryReachable;
    if facts.hub.broker.is_none() {
        return Check::info(id, "not tried: the configuration names them");
    }
    if facts.registries.is_empty() {
        return Check::info(
            id,
            "none is configured: images come from public registries, and none from the hub",
        );
    }
    let config = quoted(&facts.config.path);
    let mut found = Vec::new();
    let mut fix = None;
    for (host, answer) in &facts.registries {
        let (said, then) = match answer {
            RegistryAnswer::Answers => continue,
            RegistryAnswer::Denied(why) => (why.clone(), denied_fix(host, &config)),
            RegistryAnswer::Failed(_) if clock_is_wrong(facts) => (
                format!(
                    "registry {host} cannot be trusted or reached while this device's clock is wrong"
                ),
                "set the clock first: see clock.wall".to_owned(),
            ),
            RegistryAnswer::Failed(why) => (why.clone(), unreachable_fix(host, &config)),
            RegistryAnswer::Silent => (
                format!("registry {host} does not answer in time"),
                unreachable_fix(host, &config),
            ),
        };
        found.push(said);
        fix.get_or_insert(then);
    }
    match fix {
        None => {
            let names: Vec<&str> = facts.registries.keys().map(String::as_str).collect();
            Check::ok(id, format!("reached: {}", names.join(", ")))
        }
        // What runs goes on running, and what is staged can be started.
        Some(fix) => Check::warning(id, found.join("; "), fix),
    }
}

fn denied_fix(host: &str, config: &str) -> String {
    if host == crate::config::HUB_REGISTRY {
        return "copy join-token anew from the hub's data directory into the file that [hub] join_token_file names"
            .to_owned();
    }
    format!(
        "in {config}, below [registries.\"{host}\"], check `username` and what is in `password_file`"
    )
}

fn unreachable_fix(host: &str, config: &str) -> String {
    if host == crate::config::HUB_REGISTRY {
        return format!(
            "in {config} check `registry` below [hub]; on the hub, in hub.toml below [api], the line `listen = \"0.0.0.0:8480\"`, since the default listens for its own machine only"
        );
    }
    format!(
        "curl -v https://{host}/v2/ shows where it ends; in {config}, below [registries.\"{host}\"], `plain_http = true` for one without TLS and `ca_file` for one with its own certificates"
    )
}
