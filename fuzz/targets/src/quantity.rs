//! The small texts of manifests and topics: sizes, shares, times, names, mounts, devices, digests, platforms.

use std::fmt::{Debug, Display};
use std::str::FromStr;

use foreshore_images::Platform;
use foreshore_protocol::id::{
    ConfigName, LabelKey, LabelValue, SecretName, ServiceName, VolumeName,
};
use foreshore_protocol::manifest::{
    DeviceAccess, DeviceMapping, DiskPath, FileMode, FileOwner, OnRotate, RestartPolicy, Tmpfs,
    VolumeMount,
};
use foreshore_protocol::quantity::{Bytes, Cpus, Span};
use foreshore_protocol::topic::Topic;
use foreshore_protocol::{AppName, DeviceId, Digest};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::{accepted, memory};

/// One text, taken for each of them.
///
/// # Panics
/// When one does not come back as written, or an error is as long as what caused it.
pub fn run(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    if let Some(bytes) = in_json::<Bytes>(text) {
        assert!(i64::try_from(bytes.0).is_ok());
    }
    if let Some(cpus) = in_json::<Cpus>(text) {
        assert!(cpus.0 < 10_000_000);
    }
    if let Some(span) = in_json::<Span>(text) {
        assert!(span.0 <= 10 * 366 * 24 * 3_600_000);
        assert_eq!(u128::from(span.0), span.duration().as_millis());
    }
    numbers(text);
    in_json::<AppName>(text);
    in_json::<ServiceName>(text);
    in_json::<DeviceId>(text);
    in_json::<VolumeName>(text);
    in_json::<ConfigName>(text);
    in_json::<SecretName>(text);
    in_json::<LabelKey>(text);
    in_json::<LabelValue>(text);
    in_json::<Digest>(text);
    in_json::<DeviceMapping>(text);
    in_json::<DiskPath>(text);
    in_json::<FileMode>(text);
    in_json::<FileOwner>(text);
    in_json::<OnRotate>(text);
    in_json::<RestartPolicy>(text);
    in_json::<Tmpfs>(text);
    in_json::<VolumeMount>(text);
    round_trip::<Platform>(text);
    if let Ok(access) = text.parse::<DeviceAccess>() {
        assert_eq!(access.to_string().parse(), Ok(access));
    }
    if let Some(topic) = Topic::parse(text) {
        accepted();
        assert_eq!(topic.to_string(), text, "a topic has one spelling");
    }
}

fn round_trip<T>(text: &str) -> Option<T>
where
    T: FromStr<Err: Display> + Display + PartialEq + Debug,
{
    match memory::within(4096 + 64 * text.len(), || text.parse::<T>()) {
        Ok(value) => {
            accepted();
            let shown = value.to_string();
            let again = shown.parse::<T>().ok();
            assert_eq!(
                again.as_ref(),
                Some(&value),
                "{text:?} is shown as {shown:?}"
            );
            Some(value)
        }
        Err(error) => {
            // A message quotes the beginning at most; escaped, a character takes up to 10 bytes.
            let length = error.to_string().len();
            assert!(length < 1600, "{length} bytes of message");
            None
        }
    }
}

/// Also as it is kept.
fn in_json<T>(text: &str) -> Option<T>
where
    T: FromStr<Err: Display> + Display + PartialEq + Debug + Serialize + DeserializeOwned,
{
    let value = round_trip::<T>(text)?;
    let written = serde_json::to_string(&value).expect("it can be written");
    let again: T = serde_json::from_str(&written).expect("what was written is read");
    assert_eq!(again, value);
    Some(value)
}

/// Numbers that stand in a manifest as such.
fn numbers(text: &str) {
    if let Ok(bytes) = serde_json::from_str::<Bytes>(text)
        && let Ok(number) = text.trim().parse::<u64>()
    {
        assert_eq!(bytes.0, number);
    }
    if let Ok(cpus) = serde_json::from_str::<Cpus>(text)
        && let Ok(number) = text.trim().parse::<f64>()
    {
        let off = (f64::from(cpus.0) - number * 1000.0).abs();
        assert!(off < 1e-6, "{text} is {cpus}");
    }
}
