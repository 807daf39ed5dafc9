//! What the parser's errors say to people: one line, the key in question, and the way out.

use serde_saphyr::{Error, MessageFormatter as _, UserMessageFormatter, budget::BudgetBreach};

use super::parse::{MAX_DEPTH, ManifestError};

/// Longer messages are cut: they would only repeat the manifest.
const MAX_MESSAGE_BYTES: usize = 1024;

/// How much of a key or value is repeated.
const MAX_EXCERPT_CHARS: usize = 60;

/// The parser's error with its place, in our words.
pub(super) fn syntax(error: &Error) -> ManifestError {
    let (line, column) = error
        .location()
        // Only a document that is no map at all has no place: its beginning is meant.
        .map_or((1, 1), |at| (at.line().max(1), at.column().max(1)));
    ManifestError::Syntax {
        line,
        column,
        message: bounded(&message(error)),
    }
}

/// Without control characters and not longer than [`MAX_MESSAGE_BYTES`].
fn bounded(message: &str) -> String {
    let mut text = String::with_capacity(message.len().min(MAX_MESSAGE_BYTES));
    for char in message.chars() {
        if text.len() > MAX_MESSAGE_BYTES {
            text.push('…');
            break;
        }
        if char.is_control() || matches!(char, '\u{2028}' | '\u{2029}') {
            text.extend(char.escape_default());
        } else {
            text.push(char);
        }
    }
    text
}

fn excerpt(text: &str) -> String {
    let mut excerpt: String = text.chars().take(MAX_EXCERPT_CHARS).collect();
    if excerpt.len() < text.len() {
        excerpt.push('…');
    }
    excerpt
}

fn message(error: &Error) -> String {
    match error {
        Error::WithSnippet { error, .. } => message(error),
        Error::Budget { breach, .. } => budget(breach),
        Error::AliasError { .. } | Error::UnknownAnchor { .. } => no_anchors(),
        Error::SerdeUnknownField { field, expected, .. } => unknown_key(field, expected),
        Error::SerdeUnknownVariant { variant, expected, .. } => unknown_value(variant, expected),
        Error::SerdeMissingField { field, .. } => format!("missing key `{field}`"),
        Error::DuplicateMappingKey { key, .. } => match key {
            Some(key) => format!("key `{}` is given twice; keep one", excerpt(key)),
            None => "a key is given twice; keep one".to_owned(),
        },
        Error::MergeKeyNotAllowed { .. } => {
            "merge keys (`<<`) are not accepted; write the keys out".to_owned()
        }
        Error::UnsupportedTag { tag, .. } => {
            format!("tag `{}` is not accepted; write the value without it", excerpt(tag))
        }
        Error::Eof { .. } => "the manifest is empty or ends too early".to_owned(),
        Error::MultipleDocuments { .. } => one_document(),
        Error::NullIntoString { .. } => no_value("a string"),
        Error::InvalidBooleanStrict { .. } => "expected true or false".to_owned(),
        Error::InvalidScalar { ty, .. } => format!("expected {}", number(ty)),
        Error::SerdeInvalidType { unexpected, expected, .. } if unexpected == "unit value" => {
            no_value(expected)
        }
        Error::SerdeInvalidType { unexpected, expected, .. } => {
            format!("expected {expected}, not a {}", excerpt(unexpected))
        }
        Error::SerdeInvalidValue { unexpected, expected, .. } => {
            format!("expected {expected}, not {}", excerpt(unexpected))
        }
        Error::Unexpected { expected, .. } => format!("expected {}", shape(expected)),
        Error::ExpectedMappingEndAfterEnumVariantValue { .. }
        | Error::ExpectedStringKeyForExternallyTaggedEnum { .. }
        | Error::ExternallyTaggedEnumExpectedScalarOrMapping { .. } => {
            "expected exactly one of the keys that are possible here, for example {count: 1} or {percent: 10}"
                .to_owned()
        }
        // The scanner's own errors; it has one variant for all of them.
        other => match UserMessageFormatter.format_message(other) {
            text if text.contains("recursion limit") => too_deep(),
            text => text.into_owned(),
        },
    }
}

fn budget(breach: &BudgetBreach) -> String {
    match breach {
        BudgetBreach::Anchors { .. } | BudgetBreach::Aliases { .. } => no_anchors(),
        BudgetBreach::Documents { .. } => one_document(),
        BudgetBreach::Depth { .. } => too_deep(),
        _ => "the manifest is too large; make it smaller".to_owned(),
    }
}

fn too_deep() -> String {
    format!("nested deeper than {MAX_DEPTH} levels")
}

fn no_anchors() -> String {
    "anchors and aliases (`&`, `*`) are not accepted; write the value out, or quote it if it is text"
        .to_owned()
}

fn one_document() -> String {
    "a manifest holds one document; put the next one into a file of its own".to_owned()
}

fn no_value(expected: &str) -> String {
    format!("there is no value here; write {expected}, or leave the key out")
}

fn number(ty: &str) -> String {
    match ty {
        "u8" => "a whole number from 0 to 255".to_owned(),
        "u16" => "a whole number from 0 to 65535".to_owned(),
        "u32" => format!("a whole number from 0 to {}", u32::MAX),
        other => format!("a {other}"),
    }
}

fn shape(expected: &str) -> &str {
    match expected {
        "mapping start" => "a map, written `key: value`",
        "sequence start" => "a list, written `[a, b]` or one `- item` a line",
        "string scalar" => "a string",
        other => other,
    }
}

fn unknown_value(value: &str, expected: &[&str]) -> String {
    let value = excerpt(value);
    if expected.contains(&"percent") {
        return format!("`{value}` is not a wave; write {{count: N}} or {{percent: N}}");
    }
    if expected.contains(&"host") {
        let way_out = "bridge and named networks are not built yet";
        return format!("`{value}` is not a network mode; use none or host ({way_out})");
    }
    match expected {
        [only] => format!("`{value}` is not known here; write {only}"),
        _ => format!(
            "`{value}` is not known here; use one of {}",
            expected.join(", ")
        ),
    }
}

fn unknown_key(key: &str, expected: &[&str]) -> String {
    let scope = Scope::of(expected);
    if let Some(way_out) = scope.and_then(|scope| scope.way_out(key)) {
        return format!("key `{key}` {way_out}");
    }
    let near =
        nearest(key, expected).map_or_else(String::new, |near| format!("; did you mean `{near}`?"));
    let end = if near.is_empty() { ";" } else { "" };
    format!(
        "unknown key `{}`{near}{end} possible here: {}",
        excerpt(key),
        expected.join(", ")
    )
}

/// The map that a key is in, told by the keys that it may hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Scope {
    App,
    Metadata,
    Spec,
    Selector,
    Service,
    Dependency,
    Command,
    Deploy,
    UpdateConfig,
    Probe,
    Http,
    Logging,
    Rollout,
    Wave,
    Canary,
    Analysis,
    PromQl,
    Webhook,
    Control,
    Window,
    ConfigMount,
    ConfigFile,
    SecretSource,
    Blkio,
    BlkioEntry,
    Budget,
}

impl Scope {
    fn of(expected: &[&str]) -> Option<Self> {
        const MARKS: [(&str, Scope); 27] = [
            ("apiVersion", Scope::App),
            ("promql", Scope::Analysis),
            ("passIf", Scope::PromQl),
            ("url", Scope::Webhook),
            ("metric", Scope::Control),
            ("image", Scope::Service),
            ("services", Scope::Spec),
            ("name", Scope::Metadata),
            ("matchLabels", Scope::Selector),
            ("groupBy", Scope::Budget),
            ("condition", Scope::Dependency),
            ("update_config", Scope::Deploy),
            ("order", Scope::UpdateConfig),
            ("http", Scope::Probe),
            ("weight_device", Scope::Blkio),
            ("weight", Scope::BlkioEntry),
            ("rate", Scope::BlkioEntry),
            ("path", Scope::Http),
            ("max_size", Scope::Logging),
            ("waves", Scope::Rollout),
            ("percent", Scope::Wave),
            ("perStratum", Scope::Canary),
            ("cron", Scope::Window),
            ("source", Scope::ConfigMount),
            ("content", Scope::ConfigFile),
            ("external", Scope::SecretSource),
            ("command", Scope::Command),
        ];
        MARKS
            .into_iter()
            .find_map(|(mark, scope)| expected.contains(&mark).then_some(scope))
    }

    /// For a key that Compose, Kubernetes or a later Foreshore has here: what to do instead. Completes
    /// "key `x` …".
    fn way_out(self, key: &str) -> Option<&'static str> {
        match self {
            Self::App => app_key(key),
            Self::Metadata => metadata_key(key),
            Self::Spec => spec_key(key),
            Self::Selector => selector_key(key),
            Self::Service => service_key(key),
            Self::Dependency => dependency_key(key),
            Self::Command => command_key(key),
            Self::Deploy => deploy_key(key),
            Self::UpdateConfig => update_config_key(key),
            Self::Probe => probe_key(key),
            Self::Http => http_key(key),
            Self::Logging => logging_key(key),
            Self::Rollout => rollout_key(key),
            Self::Wave => wave_key(key),
            Self::Canary => canary_key(key),
            Self::Analysis => analysis_key(key),
            Self::PromQl | Self::Webhook => endpoint_key(key),
            Self::Control => control_key(key),
            Self::Window => window_key(key),
            Self::ConfigMount => config_mount_key(key),
            Self::ConfigFile => config_file_key(key),
            Self::SecretSource => secret_source_key(key),
            Self::Blkio => blkio_key(key),
            Self::BlkioEntry => blkio_entry_key(key),
            Self::Budget => budget_key(key),
        }
    }
}

const NOT_BUILT: &str = "is not built yet; remove it";

fn app_key(key: &str) -> Option<&'static str> {
    Some(match key {
        "services" => "belongs under `spec`",
        "name" => "belongs under `metadata`",
        "version" => "is Compose's; write `apiVersion: foreshore/v1` and `kind: App`",
        "volumes" => "is not needed; a named volume exists once a service mounts it",
        "configs" | "secrets" | "imagePullSecrets" => "belongs under `spec`",
        "networks" | "include" => NOT_BUILT,
        "status" => "is not for users to write; remove it",
        _ => return None,
    })
}

fn metadata_key(key: &str) -> Option<&'static str> {
    Some(match key {
        "labels" | "annotations" | "namespace" => NOT_BUILT,
        _ => return None,
    })
}

fn spec_key(key: &str) -> Option<&'static str> {
    Some(match key {
        "volumes" => "is not needed; a named volume exists once a service mounts it",
        "networks" => NOT_BUILT,
        "priority" => "belongs to each service",
        "replicas" => "does not exist; every selected device runs each service once",
        "template" | "containers" => "does not exist; describe containers under `services`",
        "strategy" => "does not exist; use `rollout`",
        "matchLabels" => "belongs under `selector`",
        _ => return None,
    })
}

fn selector_key(key: &str) -> Option<&'static str> {
    Some(match key {
        "devices" => "is not built yet; give the devices a label and use `matchLabels`",
        _ => return None,
    })
}

fn service_key(key: &str) -> Option<&'static str> {
    Some(match key {
        "ports" | "expose" => {
            "is not built yet; with `network_mode: host` the service listens on the device's own ports"
        }
        "networks" | "links" | "external_links" | "dns" | "dns_search" | "dns_opt"
        | "extra_hosts" | "mac_address" => {
            "is not built yet; use `network_mode: none` or `network_mode: host`"
        }
        "healthcheck" | "readinessProbe" => "does not exist; use `probes: {readiness: …}`",
        "livenessProbe" => "does not exist; use `probes: {liveness: …}`",
        "startupProbe" => "does not exist; use `probes: {startup: …}`",
        "lifecycle" | "preStop" => "does not exist; use `pre_stop: [{command: […]}]`",
        "build" => "is not for devices; push the image to a registry, or import it into the hub",
        "resources" => "does not exist; use `mem_limit`, `cpus`, `pids_limit`",
        "mem_reservation" | "memswap_limit" | "mem_swappiness" => {
            "is not built yet; `mem_limit` limits memory, swap included"
        }
        "device_read_bps" | "device_write_bps" | "device_read_iops" | "device_write_iops"
        | "weight_device" => "belongs under `blkio_config`",
        "cpu_count" | "cpu_percent" | "cpu_period" | "cpu_quota" | "cpu_rt_runtime"
        | "cpu_rt_period" | "cpuset" => "is not built yet; use `cpus`",
        "env" => "does not exist; use `environment`",
        "env_file" | "envFrom" => "is not built yet; write the variables under `environment`",
        "args" => "does not exist; use `command`, a list",
        "volumeMounts" | "mounts" => "does not exist; use `volumes`",
        "restartPolicy" => "does not exist; use `restart`",
        "imagePullPolicy" | "pull_policy" => {
            "is not needed; images are pinned by digest when the manifest is applied"
        }
        "imagePullSecrets" => "belongs under `spec`, for all services of the app",
        "container_name" | "name" => "is not needed; containers are named after app and service",
        "scale" | "replicas" => "does not exist; every selected device runs each service once",
        "network" => "does not exist; use `network_mode`",
        "device_cgroup_rules" => {
            "does not exist; the last part of a `devices` entry says what is allowed"
        }
        "gpus" | "secrets" | "configs" | "privileged" | "cap_add" | "cap_drop" | "security_opt"
        | "securityContext" | "sysctls" | "ulimits" | "group_add" | "shm_size" | "init" | "ipc"
        | "pid" | "uts" | "userns_mode" | "cgroup" | "cgroup_parent" | "runtime" | "labels"
        | "annotations" | "profiles" | "extends" | "platform" | "stdin_open" | "tty"
        | "volumes_from" | "oom_kill_disable" | "oom_score_adj" | "isolation" | "develop"
        | "attach" | "post_start" | "models" | "provider" | "hostname" | "domainname"
        | "credential_spec" | "use_api_socket" => NOT_BUILT,
        _ => return None,
    })
}

fn dependency_key(key: &str) -> Option<&'static str> {
    Some(match key {
        "required" | "restart" => NOT_BUILT,
        _ => return None,
    })
}

fn command_key(key: &str) -> Option<&'static str> {
    Some(match key {
        "user" | "privileged" | "working_dir" | "environment" => {
            "is not built yet; it runs as the service does"
        }
        "exec" => "does not exist; write `command` here",
        _ => return None,
    })
}

fn deploy_key(key: &str) -> Option<&'static str> {
    Some(match key {
        "resources" => "does not exist here; use the service's `mem_limit`, `cpus`, `pids_limit`",
        "restart_policy" => "does not exist here; use the service's `restart`",
        "mode" | "replicas" | "placement" | "endpoint_mode" | "labels" => {
            "does not exist; every selected device runs each service once"
        }
        "rollback_config" => "is not needed; a failed release goes back by itself",
        _ => return None,
    })
}

fn update_config_key(key: &str) -> Option<&'static str> {
    Some(match key {
        "parallelism" | "delay" | "monitor" | "max_failure_ratio" | "failure_action" => {
            "does not exist here; use `spec.rollout`"
        }
        "keepOld" | "scaleDownDelaySeconds" => {
            "does not exist; use `keep_old`, for example `keep_old: 1h`"
        }
        _ => return None,
    })
}

fn probe_key(key: &str) -> Option<&'static str> {
    Some(match key {
        "httpGet" => "does not exist; use `http`",
        "tcpSocket" => "does not exist; use `tcp`",
        "test" => "does not exist; use `exec: {command: […]}`",
        "grpc" => "is not built yet; use `http`, `tcp` or `exec`",
        "periodSeconds" | "interval" => "does not exist; use `period`, for example `period: 10s`",
        "timeoutSeconds" => "does not exist; use `timeout`, for example `timeout: 1s`",
        "initialDelaySeconds" | "start_period" => {
            "does not exist; use `initial_delay`, for example `initial_delay: 5s`"
        }
        "retries" => "does not exist; use `failure_threshold`",
        "terminationGracePeriodSeconds" => "does not exist; use the service's `stop_grace_period`",
        _ => return None,
    })
}

fn http_key(key: &str) -> Option<&'static str> {
    Some(match key {
        "host" | "scheme" | "headers" | "httpHeaders" | "method" => {
            "is not built yet; the probe is a plain GET on the container's loopback"
        }
        _ => return None,
    })
}

fn logging_key(key: &str) -> Option<&'static str> {
    Some(match key {
        "driver" | "options" => "is not built yet; write `max_size` and `max_file` here",
        _ => return None,
    })
}

fn rollout_key(key: &str) -> Option<&'static str> {
    Some(match key {
        "approval" => "belongs to a wave: `waves: [{percent: 10, approval: true}]`",
        "windows" | "maintenanceWindow" | "updateWindow" | "activateWindow" => {
            "does not exist; use `window: {cron: \"0 2 * * *\", for: 2h}`"
        }
        "maxSurge" => "does not exist; a device runs one release of an app at a time",
        "groupBy" => "belongs to `kind: DisruptionBudget`, which holds for all apps at once",
        "rate" | "maxRate" => "does not exist; use `pace: {perMinute: 10}`",
        "schedule" => {
            "does not exist; use `startAt: 2026-12-01T02:00:00Z`, or `window` for times that come again"
        }
        "restarts" | "restartLimit" => "does not exist; use `maxRestarts`",
        "requires" | "requires_from" | "upgradeFrom" => {
            "does not exist; use `requiresFrom: [RELEASE]`"
        }
        "keepOld" | "keep_old" | "blueGreen" | "scaleDownDelaySeconds" => {
            "belongs to a service: `deploy: {update_config: {order: start-first, keep_old: 1h}}`"
        }
        "seed" => NOT_BUILT,
        _ => return None,
    })
}

fn analysis_key(key: &str) -> Option<&'static str> {
    Some(match key {
        "url" | "query" | "passIf" => {
            "belongs under `promql`, for example `promql: {url: http://prometheus:9090, query: …, passIf: \"< 0.01\"}`"
        }
        "metric" => "belongs under `control`, for example `control: {metric: memory}`",
        "provider" | "prometheus" | "web" => {
            "does not exist; write `promql`, `webhook` or `control`"
        }
        "successCondition" | "failureCondition" => {
            "does not exist; use `promql: {passIf: \"< 0.01\"}`"
        }
        "consecutiveErrorLimit" => {
            "does not exist; errors count as inconclusive: use `inconclusiveLimit`"
        }
        "initialDelay" => "does not exist; the first answer is asked for after one `interval`",
        "templates" | "args" | "metrics" => {
            "does not exist; write each gate into `analysis` itself"
        }
        _ => return None,
    })
}

fn endpoint_key(key: &str) -> Option<&'static str> {
    Some(match key {
        "address" => "does not exist; use `url`",
        "successCondition" | "condition" => "does not exist; use `passIf`",
        "token" | "headers" | "authentication" | "authorization" => {
            "does not exist; use `bearerSecret` with the name of a secret of the hub"
        }
        "interval" | "count" | "failureLimit" | "inconclusiveLimit" => {
            "belongs beside it, to the gate itself"
        }
        "timeoutSeconds" | "timeout" => "does not exist; an answer may take 10s",
        "insecure" | "method" | "jsonBody" | "jsonPath" => NOT_BUILT,
        _ => return None,
    })
}

fn control_key(key: &str) -> Option<&'static str> {
    Some(match key {
        "interval" | "count" | "failureLimit" | "inconclusiveLimit" => {
            "belongs beside it, to the gate itself"
        }
        "by" | "strata" => "belongs to `canary`, whose kinds are compared",
        _ => return None,
    })
}

fn budget_key(key: &str) -> Option<&'static str> {
    Some(match key {
        "minAvailable" => "does not exist; use `maxUnavailable`",
        "matchLabels" | "matchExpressions" => "belongs under `selector`",
        "services" | "rollout" => "belongs to `kind: App`",
        "apps" => "does not exist; a budget holds for all apps of the devices that it selects",
        "unhealthyPodEvictionPolicy" | "window" | "ttl" => NOT_BUILT,
        _ => return None,
    })
}

fn wave_key(key: &str) -> Option<&'static str> {
    Some(match key {
        "canary" => "belongs beside `waves`, not among them",
        "matchLabels" | "matchExpressions" => "belongs under `selector`",
        "pause" | "approve" | "manual" => "does not exist; use `approval: true`",
        "size" | "devices" => "does not exist; use `count`, `percent` or `selector`",
        "soak" | "pace" | "maxUnavailable" | "onFailure" => "belongs beside `waves`",
        _ => return None,
    })
}

fn canary_key(key: &str) -> Option<&'static str> {
    Some(match key {
        "count" | "size" => "does not exist; use `perStratum`, or a first wave `{count: 1}`",
        "groupBy" | "labels" => "does not exist; use `by: [model, site]`",
        _ => return None,
    })
}

fn window_key(key: &str) -> Option<&'static str> {
    Some(match key {
        "schedule" | "start" | "at" => {
            "does not exist; use `cron`, for example `cron: \"0 2 * * *\"`"
        }
        "duration" | "open_for" | "openFor" | "length" | "end" => {
            "does not exist; use `for`, for example `for: 2h`"
        }
        "tz" | "zone" | "location" => {
            "does not exist; use `timezone`, for example `timezone: Europe/Berlin`"
        }
        _ => return None,
    })
}

fn config_mount_key(key: &str) -> Option<&'static str> {
    Some(match key {
        "name" | "config" => "does not exist; use `source`",
        "path" | "mountPath" => "does not exist; use `target`",
        _ => return None,
    })
}

fn config_file_key(key: &str) -> Option<&'static str> {
    Some(match key {
        "file" | "environment" | "external" | "name" | "template_driver" => {
            "is not built yet; write the text under `content`"
        }
        _ => return None,
    })
}

fn secret_source_key(key: &str) -> Option<&'static str> {
    Some(match key {
        "file" | "environment" | "content" | "value" => {
            "is not for manifests, which everybody may read; write `external: true` and set the value with `foreshore \
             secret set NAME`"
        }
        _ => return None,
    })
}

fn blkio_key(key: &str) -> Option<&'static str> {
    Some(match key {
        "read_bps" | "rbps" | "io_maxbandwidth" => {
            "does not exist; use `device_read_bps: [{path: state, rate: 1m}]`"
        }
        "write_bps" | "wbps" => "does not exist; use `device_write_bps: [{path: state, rate: 1m}]`",
        "read_iops" | "riops" | "io_maxiops" => {
            "does not exist; use `device_read_iops: [{path: state, rate: 100}]`"
        }
        "write_iops" | "wiops" => {
            "does not exist; use `device_write_iops: [{path: state, rate: 100}]`"
        }
        "leaf_weight" | "leaf_weight_device" => "does not exist; use `weight`",
        _ => return None,
    })
}

fn blkio_entry_key(key: &str) -> Option<&'static str> {
    Some(match key {
        "device" | "disk" | "major" | "minor" => "does not exist; use `path`",
        "bps" | "iops" | "limit" | "value" => "does not exist; use `rate`",
        _ => return None,
    })
}

/// The possible key that was probably meant: the same letters in another spelling, or at most two edits
/// away.
fn nearest<'a>(key: &str, expected: &[&'a str]) -> Option<&'a str> {
    if key.len() > MAX_EXCERPT_CHARS {
        return None;
    }
    let plain = |text: &str| text.replace(['_', '-'], "").to_ascii_lowercase();
    let wanted = plain(key);
    expected
        .iter()
        .map(|candidate| (distance(&wanted, &plain(candidate)), *candidate))
        .filter(|(distance, candidate)| *distance <= 2 && *distance * 2 < candidate.len())
        .min()
        .map(|(_, candidate)| candidate)
}

/// The Levenshtein distance.
fn distance(from: &str, to: &str) -> usize {
    let to: Vec<char> = to.chars().collect();
    let mut row: Vec<usize> = (0..=to.len()).collect();
    for (i, a) in from.chars().enumerate() {
        let mut diagonal = i;
        row[0] = i + 1;
        for (j, b) in to.iter().enumerate() {
            let substitute = diagonal + usize::from(a != *b);
            diagonal = row[j + 1];
            row[j + 1] = substitute.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[to.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn edit_distances() {
        for (from, to, edits) in [
            ("", "", 0),
            ("a", "", 1),
            ("imag", "image", 1),
            ("kitten", "sitting", 3),
        ] {
            assert_eq!(distance(from, to), edits, "{from} {to}");
        }
    }

    #[test]
    fn other_spellings_and_slips_are_near() {
        let keys = ["maxUnavailable", "waves", "soak", "cpus"];
        assert_eq!(nearest("max_unavailable", &keys), Some("maxUnavailable"));
        assert_eq!(nearest("wave", &keys), Some("waves"));
        assert_eq!(nearest("ab", &keys), None);
        assert_eq!(nearest("unrelated", &keys), None);
    }
}
