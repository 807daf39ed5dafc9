//! The configuration, and the way to the hub.

use super::*;

#[test]
fn every_step_of_the_way_to_the_hub_has_its_own_finding() {
    let mut facts = debian();
    facts.hub.connect = Connect::NotTried;
    facts.hub.tls = Handshake::NotTried;
    facts.hub.resolve = Tried::Fails("Name or service not known".to_owned());
    finding(
        &facts,
        CheckId::HubResolve,
        Level::Error,
        "hub.lan has no address",
        "/etc/hosts",
    );
    assert_eq!(bad(&facts), [(CheckId::HubResolve, Level::Error)]);
    facts.hub.resolve = Tried::TimedOut(21);
    finding(
        &facts,
        CheckId::HubResolve,
        Level::Error,
        "no nameserver answered",
        "ip route",
    );
    facts.hub.resolve = Tried::Fails("Temporary failure in name resolution".to_owned());
    finding(
        &facts,
        CheckId::HubResolve,
        Level::Error,
        "Temporary",
        "no nameserver answers",
    );
    facts.hub.resolve = Tried::Fails("Name or service not known".to_owned());
    facts.hub.nameservers = 0;
    finding(
        &facts,
        CheckId::HubResolve,
        Level::Error,
        "",
        "/etc/resolv.conf names no nameserver",
    );
    facts.hub.nameservers = 1;
    facts.hub.broker.as_mut().unwrap().host = "hub.local".to_owned();
    finding(&facts, CheckId::HubResolve, Level::Error, "", "libnss-mdns");

    for (connect, found, fix) in [
        (
            Connect::Refused,
            "nobody listens",
            "listen = \"0.0.0.0:8883\"",
        ),
        (Connect::Silent, "within 5 s", "ufw allow 8883/tcp"),
        (Connect::NoRoute, "no way", "ip route"),
        (
            Connect::Failed("odd".to_owned()),
            "odd",
            "nc -vz hub.lan 8883",
        ),
    ] {
        let mut facts = debian();
        facts.hub.connect = connect;
        facts.hub.tls = Handshake::NotTried;
        finding(&facts, CheckId::HubConnect, Level::Error, found, fix);
        assert_eq!(bad(&facts), [(CheckId::HubConnect, Level::Error)]);
    }
    for (tls, found, fix) in [
        (
            Handshake::UnknownIssuer,
            "unknown issuer",
            "ca_file = \"/etc/foreshore/hub-ca.pem\"",
        ),
        (Handshake::Expired, "has expired", "renew"),
        (Handshake::NotYetValid, "not valid yet", "date -u"),
        (Handshake::OtherName, "another name", "subjectAltName"),
        (Handshake::NotTls, "does not speak TLS", "8883"),
        (
            Handshake::Silent,
            "5 s",
            "openssl s_client -connect hub.lan:8883",
        ),
        (
            Handshake::NoRoots("none".to_owned()),
            "no certificates",
            "ca-certificates",
        ),
        (Handshake::Failed("odd".to_owned()), "odd", "openssl"),
    ] {
        let mut facts = debian();
        facts.hub.tls = tls;
        finding(&facts, CheckId::HubTls, Level::Error, found, fix);
    }
    let mut facts = debian();
    facts.hub.broker.as_mut().unwrap().tls = false;
    facts.hub.tls = Handshake::NotTried;
    finding(&facts, CheckId::HubTls, Level::Info, "not used", "mqtts://");
}

#[test]
fn registries_are_told_by_name_and_the_hub_s_by_its_token() {
    let mut facts = debian();
    let answers = [
        (
            "hub.internal",
            RegistryAnswer::Denied("not the token".to_owned()),
        ),
        ("registry.lan:5000", RegistryAnswer::Silent),
        ("docker.io", RegistryAnswer::Answers),
    ];
    facts.registries = answers
        .map(|(host, answer)| (host.to_owned(), answer))
        .into();
    finding(
        &facts,
        CheckId::RegistryReachable,
        Level::Warning,
        "not the token",
        "join-token",
    );
    finding(
        &facts,
        CheckId::RegistryReachable,
        Level::Warning,
        "registry.lan:5000 does not answer",
        "",
    );
    facts.registries.remove("hub.internal");
    finding(
        &facts,
        CheckId::RegistryReachable,
        Level::Warning,
        "",
        "below [registries.\"registry.lan:5000\"]",
    );
    facts.registries.insert(
        "registry.lan:5000".to_owned(),
        RegistryAnswer::Failed("invalid peer certificate: NotValidYet".to_owned()),
    );
    finding(
        &facts,
        CheckId::RegistryReachable,
        Level::Warning,
        "NotValidYet",
        "curl -v",
    );
    facts.clock.unix_s = 0;
    finding(
        &facts,
        CheckId::RegistryReachable,
        Level::Warning,
        "clock",
        "see clock.wall",
    );
    facts.registries = BTreeMap::new();
    finding(
        &facts,
        CheckId::RegistryReachable,
        Level::Info,
        "none is configured",
        "",
    );
}

#[test]
fn a_configuration_that_is_missing_wrong_or_open_to_others_is_told() {
    let mut facts = debian();
    facts.config.mode = Some(0o666);
    finding(
        &facts,
        CheckId::ConfigFile,
        Level::Warning,
        "mode 0666",
        "chmod go-w",
    );
    facts.config.read = Err(ConfigProblem::Missing);
    facts.hub.broker = None;
    facts.registries.clear();
    facts.secrets.clear();
    finding(
        &facts,
        CheckId::ConfigFile,
        Level::Error,
        "there is no",
        "join_token_file",
    );
    assert_eq!(bad(&facts), [(CheckId::ConfigFile, Level::Error)]);
    facts.config.read = Err(ConfigProblem::Wrong(
        "unknown field `keepalives` at line 5".to_owned(),
    ));
    finding(
        &facts,
        CheckId::ConfigFile,
        Level::Error,
        "line 5",
        "check-config",
    );
}

#[test]
fn secrets_that_others_can_read_or_that_are_not_there_are_told() {
    let mut facts = debian();
    facts.secrets[0].owner = Some((0o644, 0));
    facts.secrets[0].path = "/etc/fore shore/it's".into();
    finding(
        &facts,
        CheckId::ConfigSecrets,
        Level::Warning,
        "mode 0644",
        r"chmod 600 '/etc/fore shore/it'\''s'",
    );
    facts.secrets[0].owner = Some((0o600, 1000));
    finding(
        &facts,
        CheckId::ConfigSecrets,
        Level::Warning,
        "owner 1000",
        "chown root",
    );
    facts.secrets[0].owner = None;
    facts.secrets[0].problem = Some("no such file".to_owned());
    finding(
        &facts,
        CheckId::ConfigSecrets,
        Level::Error,
        "hub.join_token_file",
        "install -m 600",
    );
}
