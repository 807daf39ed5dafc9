//! `[pull]`: when and how fast this device fetches images, and whether its link costs money right now.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;

use foreshore_images::registry::{ClientConfig, DockerConfig, DockerConfigError, Gate, Retry};
use foreshore_protocol::quantity::Bytes;
use serde::Deserialize;

/// Slower than this a pull would not keep the least pace that registries are held to.
const RATE_MIN: Bytes = Bytes(16 << 10);

/// The table.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PullConfig {
    /// The most bytes a second for all images together. Default: no limit.
    pub rate_limit: Option<Bytes>,
    /// When the link is one that costs money: then no image is fetched, but from registries marked `unmetered`.
    pub metered: Metered,
    /// An HTTP proxy for registries that are reached by HTTPS, `http://[USER:PASSWORD@]HOST[:PORT]`. Default: what the
    /// environment says (`HTTPS_PROXY`, `NO_PROXY`).
    pub proxy: Option<String>,
    /// Hosts that are reached without `proxy`: `h.example.com`, or `.example.com` for all below.
    pub no_proxy: Vec<String>,
    /// Keep the setuid and setgid bits of programs and their file capabilities when images are unpacked. Containers cannot
    /// gain rights by them in any case (`no_new_privs`). Counts for layers that are unpacked from then on. Default: false.
    pub keep_privileges: bool,
    /// A docker `config.json` with logins for registries that have no `username` here.
    pub docker_config: Option<PathBuf>,
    /// Make new layers of images that are here, where the registry has a delta for that. Default: true.
    pub deltas: bool,
}

impl Default for PullConfig {
    fn default() -> Self {
        Self {
            rate_limit: None,
            metered: Metered::default(),
            proxy: None,
            no_proxy: Vec::new(),
            keep_privileges: false,
            docker_config: None,
            deltas: true,
        }
    }
}

/// When the link costs money.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(untagged)]
pub enum Metered {
    /// `false`: never. The default. `true`: always.
    Fixed(bool),
    /// While the default route goes through one of these interfaces; a `*` at the end stands for anything.
    Interfaces(Vec<String>),
    /// Nothing was said: never.
    #[default]
    #[serde(skip)]
    Unsaid,
}

impl PullConfig {
    /// Whether the values go together.
    ///
    /// # Errors
    ///
    /// With what is wrong, for people.
    pub fn check(&self) -> Result<(), String> {
        if self.rate_limit.is_some_and(|rate| rate < RATE_MIN) {
            return Err(format!(
                "pull.rate_limit is less than {} bytes a second; that would be too slow to ever finish",
                RATE_MIN.0
            ));
        }
        if let Metered::Interfaces(names) = &self.metered
            && let Some(bad) = names.iter().find(|name| {
                let stem = name.strip_suffix('*').unwrap_or(name);
                name.is_empty() || stem.contains(['*', '/', ' '])
            })
        {
            return Err(format!(
                "pull.metered: \"{bad}\" is not the name of an interface, or its beginning and \"*\""
            ));
        }
        Ok(())
    }

    /// Puts it into the configuration of a registry client; logins of `docker_config` go to those that have none.
    ///
    /// # Errors
    ///
    /// When `docker_config` cannot be used.
    pub fn apply(&self, client: &mut ClientConfig) -> Result<(), DockerConfigError> {
        client.retry = Retry::PATIENT;
        client.rate_bytes = self.rate_limit.map(|rate| rate.0);
        client.proxy.clone_from(&self.proxy);
        client.no_proxy.clone_from(&self.no_proxy);
        if self.metered.is_ever() {
            let metered = self.metered.clone();
            client.gate = Some(Gate::new(move || metered.now()));
        }
        if let Some(path) = &self.docker_config {
            DockerConfig::read(path)?.fill(client);
        }
        Ok(())
    }
}

impl Metered {
    const fn is_ever(&self) -> bool {
        match self {
            Self::Fixed(metered) => *metered,
            Self::Interfaces(names) => !names.is_empty(),
            Self::Unsaid => false,
        }
    }

    /// Whether the link costs money at this moment.
    #[must_use]
    pub fn is_now(&self) -> bool {
        self.is_ever() && self.now().is_err()
    }

    /// Looks at the routes of this network namespace.
    fn now(&self) -> Result<(), String> {
        let read = |name: &str| fs::read_to_string(format!("/proc/self/net/{name}"));
        // Without IPv6 there is no such file.
        let routes = default_interfaces(
            &read("route").unwrap_or_default(),
            &read("ipv6_route").unwrap_or_default(),
        );
        self.verdict(&routes)
    }

    fn verdict(&self, routes: &BTreeSet<String>) -> Result<(), String> {
        match self {
            Self::Fixed(false) | Self::Unsaid => Ok(()),
            Self::Fixed(true) => Err("pull.metered is true".to_owned()),
            Self::Interfaces(names) => {
                let matches = |route: &str| {
                    names.iter().any(|name| match name.strip_suffix('*') {
                        Some(stem) => route.starts_with(stem),
                        None => route == name,
                    })
                };
                match routes.iter().find(|route| matches(route)) {
                    Some(route) => Err(format!("the way out is {route}, which is metered")),
                    None => Ok(()),
                }
            }
        }
    }
}

/// The interfaces of the default routes that are used: of those with the least metric (proc_pid_net(5), kernel
/// documentation "/proc/net/ipv6_route").
fn default_interfaces(route: &str, ipv6_route: &str) -> BTreeSet<String> {
    let v4 = route.lines().skip(1).filter_map(|line| {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        let [name, "00000000", _, flags, _, _, metric, "00000000", ..] = fields[..] else {
            return None;
        };
        let up = u32::from_str_radix(flags, 16).is_ok_and(|flags| flags & 1 != 0);
        up.then_some((metric.parse::<u32>().ok()?, name))
    });
    let v6 = ipv6_route.lines().filter_map(|line| {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        let [to, "00", _, _, _, metric, _, _, flags, name] = fields[..] else {
            return None;
        };
        let flags = u32::from_str_radix(flags, 16).ok()?;
        // RTF_UP, and neither RTF_REJECT nor the loopback's own.
        let used = to.bytes().all(|digit| digit == b'0') && flags & 1 != 0 && flags & 0x200 == 0;
        (used && name != "lo").then_some((u32::from_str_radix(metric, 16).ok()?, name))
    });
    let mut found = BTreeSet::new();
    for family in [v4.collect::<Vec<_>>(), v6.collect()] {
        let least = family.iter().map(|(metric, _)| *metric).min();
        found.extend(
            family
                .into_iter()
                .filter(|(metric, _)| Some(*metric) == least)
                .map(|(_, name)| name.to_owned()),
        );
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    const V4: &str = "\
Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT
wwan0\t00000000\t0100A8C0\t0003\t0\t0\t700\t00000000\t0\t0\t0
eth0\t00000000\t0101A8C0\t0003\t0\t0\t100\t00000000\t0\t0\t0
eth0\t0001A8C0\t00000000\t0001\t0\t0\t100\t00FFFFFF\t0\t0\t0
";
    const V6: &str = "\
fe800000000000000000000000000000 40 00000000000000000000000000000000 00 00000000000000000000000000000000 00000100 00000001 00000000 00000001     eth0
00000000000000000000000000000000 00 00000000000000000000000000000000 00 fe800000000000000000000000000001 00000400 00000001 00000000 00000003    wwan1
00000000000000000000000000000000 00 00000000000000000000000000000000 00 00000000000000000000000000000000 ffffffff 00000001 00000000 00200200       lo
";

    #[test]
    fn the_way_out_is_the_default_route_that_is_used() {
        let names = |v4: &str, v6: &str| default_interfaces(v4, v6).into_iter().collect::<Vec<_>>();
        assert_eq!(names(V4, ""), ["eth0"]);
        assert_eq!(names(V4, V6), ["eth0", "wwan1"]);
        // The cable is out.
        let without: String = V4
            .lines()
            .filter(|line| !line.starts_with("eth0\t00000000"))
            .map(|line| format!("{line}\n"))
            .collect();
        assert_eq!(names(&without, ""), ["wwan0"]);
        assert_eq!(names("", ""), Vec::<&str>::new());
        assert_eq!(names("nonsense\nnonsense", "x\ny z"), Vec::<&str>::new());
    }

    #[test]
    fn metered_by_interface_always_or_never() {
        let table = |text: &str| toml::from_str::<PullConfig>(text).unwrap();
        let eth: BTreeSet<String> = ["eth0".to_owned()].into();
        let wwan: BTreeSet<String> = ["wwan0".to_owned()].into();
        let by_name = table("metered = [\"wwan*\", \"usb0\"]").metered;
        assert!(by_name.is_ever());
        assert_eq!(by_name.verdict(&eth), Ok(()));
        let closed = by_name.verdict(&wwan).unwrap_err();
        assert!(closed.contains("wwan0"), "{closed}");
        assert!(table("metered = true").metered.verdict(&eth).is_err());
        for never in ["", "metered = false", "metered = []"] {
            assert!(!table(never).metered.is_ever(), "{never}");
        }
        // Really looked at; what the routes here are is not known.
        let _either = by_name.now();
    }

    #[test]
    fn bad_values_are_named() {
        for (text, named) in [
            ("rate_limit = \"1k\"", "rate_limit"),
            ("metered = [\"a*b\"]", "a*b"),
            ("metered = [\"\"]", "\"\""),
        ] {
            let table: PullConfig = toml::from_str(text).unwrap();
            let error = table.check().unwrap_err();
            assert!(error.contains(named), "{text}: {error}");
        }
        for text in ["metered = \"sometimes\"", "speed = 1"] {
            assert!(toml::from_str::<PullConfig>(text).is_err(), "{text}");
        }
    }

    #[test]
    fn deltas_are_used_unless_told_otherwise() {
        let table = |text: &str| toml::from_str::<PullConfig>(text).unwrap();
        assert!(table("").deltas && table("deltas = true").deltas && PullConfig::default().deltas);
        assert!(!table("deltas = false").deltas);
        assert!(toml::from_str::<PullConfig>("deltas = \"no\"").is_err());
    }

    #[test]
    fn docker_s_logins_fill_what_is_not_said() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.json");
        fs::write(
            &path,
            r#"{"auths": {"a.example": {"username": "u", "password": "p"}, "b.example": {"username": "u", "password": "p"}}}"#,
        )
        .unwrap();
        let pull = PullConfig {
            docker_config: Some(path),
            ..PullConfig::default()
        };
        let mut client = ClientConfig::default();
        let own = foreshore_images::registry::Credentials::new("own", "own");
        client
            .registries
            .entry("a.example".to_owned())
            .or_default()
            .credentials = Some(own.clone());
        pull.apply(&mut client).unwrap();
        assert_eq!(client.registries["a.example"].credentials, Some(own));
        assert!(client.registries["b.example"].credentials.is_some());
        assert_eq!(client.retry, Retry::PATIENT);
        let missing = PullConfig {
            docker_config: Some("/nonexistent".into()),
            ..PullConfig::default()
        };
        assert!(missing.apply(&mut ClientConfig::default()).is_err());
    }
}
