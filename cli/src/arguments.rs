//! The command line: every verb, option and example that `--help` teaches.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use foreshore_images::Platform;
use foreshore_protocol::id::SecretName;
use foreshore_protocol::quantity::Span;
use foreshore_protocol::{AppName, DeviceId};

/// The part of the help that scripts need; a macro because `concat!` wants a literal.
macro_rules! exit_codes {
    () => {
        "\
Exit codes:
  0  done, or nothing to do
  1  the hub refused or failed, or this machine did
  2  wrong usage or a wrong manifest
  3  the answer is no: a rollout ended badly, or `plan --exit-code` found changes
  4  a rollout is paused and waits for an operator
  5  the hub could not be reached, or did not answer in time
  6  --timeout passed first

Data goes to standard output, everything else to standard error."
    };
}

/// Run containers on fleets of small devices, updated in waves.
#[derive(Debug, Parser)]
#[command(name = "foreshore", version, max_term_width = 100, after_help = concat!("\
Examples:
  foreshore validate -f gateway.yaml        check a manifest; needs no hub
  foreshore plan -f gateway.yaml            what would change, on which devices, in which wave
  foreshore apply -f gateway.yaml           make it so
  foreshore rollout status -w gateway       watch it reach the devices
  foreshore rollout undo gateway            go back to the release before
  foreshore get devices                     who is there, and how well
  foreshore events -w --device gw-3         what happens, as it happens

", exit_codes!()))]
pub(crate) struct Arguments {
    /// How to print data
    #[arg(short, long, global = true, value_enum, default_value_t = Format::Table, value_name = "FORMAT")]
    pub(crate) output: Format,

    #[command(flatten)]
    pub(crate) hub: HubArguments,

    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Where the hub is, and how to speak to it.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Hub")]
pub(crate) struct HubArguments {
    /// The hub's address
    #[arg(
        long,
        global = true,
        hide_short_help = true,
        env = "FORESHORE_HUB",
        hide_env_values = true,
        default_value = "http://127.0.0.1:8480",
        value_name = "URL"
    )]
    pub(crate) hub: String,

    /// File that holds the API token [env: FORESHORE_TOKEN_FILE, or FORESHORE_TOKEN for the token
    /// itself] [default: /var/lib/foreshore-hub/api-token]
    #[arg(long, global = true, hide_short_help = true, value_name = "FILE")]
    pub(crate) token_file: Option<PathBuf>,

    /// File with PEM certificates to trust for an https hub, instead of the public ones
    #[arg(
        long,
        global = true,
        hide_short_help = true,
        env = "FORESHORE_CA_FILE",
        hide_env_values = true,
        value_name = "FILE"
    )]
    pub(crate) ca_file: Option<PathBuf>,

    /// How long one request may take
    #[arg(long, global = true,hide_short_help = true, default_value = "30s", value_parser = duration, value_name = "DURATION")]
    pub(crate) request_timeout: Duration,
}

/// How data is printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// For people; its columns may change
    Table,
    /// For programs: the hub's API objects; a stream is one object per line
    Json,
    /// Only `kind/name`, one per line
    Name,
}

/// The verbs.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Check manifests without a hub
    #[command(after_help = "\
Prints FILE:LINE:COLUMN: MESSAGE for each manifest that is wrong and ends with 2; with 0 if all are right.

Examples:
  foreshore validate -f gateway.yaml -f camera.yaml
  generate-manifest | foreshore validate -f -")]
    Validate(Files),

    /// Show what `apply` would change, on which devices, wave by wave
    #[command(after_help = "\
Changes nothing. The order of devices in a real rollout is drawn when it begins; this shows one draw.

Examples:
  foreshore plan -f gateway.yaml
  foreshore plan -f gateway.yaml --exit-code || echo 'something would change'")]
    Plan {
        #[command(flatten)]
        files: Files,
        /// End with 3 when something would change, with 0 when nothing would
        #[arg(long)]
        exit_code: bool,
    },

    /// Create or change apps and disruption budgets
    #[command(after_help = "\
All files are checked before the first is applied; disruption budgets are applied first.
Applying what is there already does nothing.

Examples:
  foreshore apply -f gateway.yaml
  foreshore apply -f gateway.yaml && foreshore rollout status -w gateway")]
    Apply(Files),

    /// List apps, devices, rollouts, budgets, images or events, or show one line of them
    #[command(after_help = "\
Examples:
  foreshore get devices
  foreshore get app gateway -o json
  foreshore get rollouts --app gateway
  foreshore get devices -o name | grep edge- ")]
    Get(Get),

    /// Show everything about one app, device, rollout or disruption budget
    #[command(after_help = "\
Examples:
  foreshore describe device gw-3
  foreshore describe app gateway
  foreshore describe rollout 12
  foreshore describe budget lines           who is unavailable in each group, and how many wait")]
    Describe {
        /// What kind of thing
        #[arg(value_enum)]
        kind: DescribeKind,
        /// Its name; a rollout's id, or an app's name for its newest rollout
        name: String,
    },

    /// Show why a device runs what it runs, and what it waits for
    #[command(after_help = "\
Each line is one link from what was applied to what the device does; `waits for` says what must happen next.

Example:
  foreshore explain device gw-3")]
    Explain {
        /// What kind of thing; only devices are explained
        #[arg(value_enum)]
        kind: LabelKind,
        /// The device
        name: DeviceId,
    },

    /// Delete an app from the fleet or a disruption budget, or forget a device that is gone
    #[command(after_help = "\
Deleting an app stops and removes its containers on every device; named volumes stay on the devices.
A device can be forgotten while it is offline; if it connects again, it is known again.

Examples:
  foreshore delete app gateway
  foreshore delete device gw-9 --yes")]
    Delete {
        /// What kind of thing
        #[arg(value_enum)]
        kind: DeleteKind,
        /// Its name
        name: String,
        /// Do not ask
        #[arg(short, long)]
        yes: bool,
    },

    /// Set or remove labels of a device
    #[command(after_help = "\
Labels set here win over those in the device's own configuration. Apps select devices by label.

Examples:
  foreshore label device gw-3 role=gateway site=hull
  foreshore label device gw-3 site-               remove it")]
    Label {
        /// What kind of thing; only devices have labels
        #[arg(value_enum)]
        kind: LabelKind,
        /// The device
        name: DeviceId,
        /// KEY=VALUE sets a label, KEY- removes it
        #[arg(required = true, value_name = "KEY=VALUE|KEY-")]
        changes: Vec<String>,
    },

    /// Watch and steer rollouts
    #[command(subcommand)]
    Rollout(Rollout),

    /// Show what happened, or follow it
    #[command(after_help = "\
With --app or --device, the newest 1000 events of all are looked at. With -w the connection is taken
up again where it broke, without gaps.

Examples:
  foreshore events
  foreshore events -w --app gateway
  foreshore events -w -o json | jq -r .message")]
    Events(Events),

    /// Images kept in the hub, for sites without a registry
    #[command(subcommand)]
    Image(Image),

    /// Secrets kept in the hub, for services that name them
    #[command(subcommand)]
    Secret(Secret),

    /// Hold a device, release it, or trust its new key
    #[command(subcommand)]
    Device(Device),

    /// Turns of devices under disruption budgets
    #[command(subcommand)]
    Lease(Lease),

    /// Print a completion script for a shell
    #[command(after_help = "\
Examples:
  foreshore completions bash > /etc/bash_completion.d/foreshore
  foreshore completions zsh > ~/.zfunc/_foreshore")]
    Completions {
        /// Which shell
        #[arg(value_enum)]
        shell: clap_complete::Shell,
    },

    /// Print the version of this program and of the hub, if it answers
    Version,
}

/// Manifests to read.
#[derive(Debug, Args)]
pub(crate) struct Files {
    /// Manifest of an app or disruption budget in YAML or JSON; `-` reads standard input; may be given several times
    #[arg(short, long = "file", required = true, value_name = "FILE")]
    pub(crate) files: Vec<PathBuf>,
}

/// `get`.
#[derive(Debug, Args)]
pub(crate) struct Get {
    /// What kind of thing
    #[arg(value_enum)]
    pub(crate) kind: GetKind,
    /// Only this one
    pub(crate) name: Option<String>,
    /// Only of this app (rollouts, events)
    #[arg(long)]
    pub(crate) app: Option<AppName>,
    /// Only from this device (events)
    #[arg(long)]
    pub(crate) device: Option<DeviceId>,
}

/// What `get` can list.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum GetKind {
    /// Apps
    #[value(alias = "app")]
    Apps,
    /// Devices
    #[value(alias = "device")]
    Devices,
    /// Rollouts, newest first
    #[value(alias = "rollout")]
    Rollouts,
    /// Images imported into the hub
    #[value(alias = "image")]
    Images,
    /// Disruption budgets
    #[value(aliases = ["budget", "disruption-budget", "disruption-budgets"])]
    Budgets,
    /// The newest events
    #[value(alias = "event")]
    Events,
}

/// What `describe` knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum DescribeKind {
    /// An app
    #[value(alias = "apps")]
    App,
    /// A device
    #[value(alias = "devices")]
    Device,
    /// A disruption budget
    #[value(aliases = ["budgets", "disruption-budget", "disruption-budgets"])]
    Budget,
    /// A rollout
    #[value(alias = "rollouts")]
    Rollout,
}

/// What `delete` can delete.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum DeleteKind {
    /// An app
    #[value(alias = "apps")]
    App,
    /// A disruption budget
    #[value(aliases = ["budgets", "disruption-budget", "disruption-budgets"])]
    Budget,
    /// A device
    #[value(alias = "devices")]
    Device,
}

/// What `label` can label.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum LabelKind {
    /// A device
    #[value(alias = "devices")]
    Device,
}

/// `rollout`.
#[derive(Debug, Subcommand)]
pub(crate) enum Rollout {
    /// Show an app's newest rollout, or follow it to its end
    #[command(after_help = "\
Ends with 0 when it completed (or still runs, without -w), 3 when it was aborted, rolled back or
superseded, 4 when it is paused or a wave waits for an approval, 6 when --timeout passed first. With -w it goes on through hub
restarts; progress bars on a terminal, one line per change elsewhere, one JSON object per change
with -o json.

Examples:
  foreshore rollout status gateway
  foreshore rollout status -w gateway --timeout 30m")]
    Status {
        /// The app
        app: AppName,
        /// Follow until it ends or pauses
        #[arg(short, long)]
        watch: bool,
        /// Stop following after this long and end with 6
        #[arg(long, value_parser = duration, value_name = "DURATION", requires = "watch")]
        timeout: Option<Duration>,
        /// This rollout of the app rather than its newest
        #[arg(long, value_name = "ID")]
        id: Option<u64>,
    },
    /// Offer the release to no further device until it is resumed
    Pause {
        /// The app
        app: AppName,
    },
    /// Go on after a pause; a scheduled rollout begins now
    Resume {
        /// The app
        app: AppName,
    },
    /// Let the wave go by that waits for an approval
    #[command(after_help = "\
A wave waits when its manifest says `approval: true` and its gates are passed; `rollout status` shows it.

Example:
  foreshore rollout approve gateway")]
    Approve {
        /// The app
        app: AppName,
    },
    /// Try failed devices again
    #[command(after_help = "\
They count as failed again only when they fail again. Resuming a rollout that failures stopped does the same.

Examples:
  foreshore rollout retry gateway
  foreshore rollout retry gateway --device gw-3")]
    Retry {
        /// The app
        app: AppName,
        /// Only this device
        #[arg(long)]
        device: Option<DeviceId>,
    },
    /// End it where it is: devices that have the release keep it
    Abort {
        /// The app
        app: AppName,
    },
    /// Update devices although the app holds its update lock there
    OverrideLocks {
        /// The app
        app: AppName,
    },
    /// Update devices although their windows are closed
    OverrideWindows {
        /// The app
        app: AppName,
    },
    /// Roll out the release before, in waves like any other
    Undo {
        /// The app
        app: AppName,
    },
    /// List an app's rollouts, newest first
    History {
        /// The app
        app: AppName,
    },
}

/// `events`.
#[derive(Debug, Args)]
pub(crate) struct Events {
    /// Follow: print new events as they come, until interrupted
    #[arg(short, long)]
    pub(crate) watch: bool,
    /// Only of this app
    #[arg(long)]
    pub(crate) app: Option<AppName>,
    /// Only from this device
    #[arg(long)]
    pub(crate) device: Option<DeviceId>,
    /// Begin after the event with this id instead of with the newest
    #[arg(long, value_name = "ID")]
    pub(crate) after: Option<u64>,
    /// At most this many events of the past
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(0..=1000), value_name = "COUNT")]
    pub(crate) limit: u32,
}

/// `image`.
#[derive(Debug, Subcommand)]
pub(crate) enum Image {
    /// Send an image to the hub; manifests then name it hub.internal/NAME:TAG
    #[command(after_help = "\
Takes an OCI layout (a directory, or a tar of one) or the tar that `docker save` and
`podman save` write. The hub checks every blob against its digest before it keeps the image.

Examples:
  docker save acme/web:1.4 | foreshore image import - --name web:1.4
  skopeo copy docker://ghcr.io/acme/web:1.4 oci-archive:web.tar
  foreshore image import web.tar --name web:1.4
  foreshore image import ./layout --name web:1.4")]
    Import {
        /// A tar file, `-` for standard input, or an OCI layout directory
        source: PathBuf,
        /// What to call it: NAME:TAG. Default: what the archive itself says
        #[arg(long, value_name = "NAME:TAG")]
        name: Option<String>,
    },
    /// List the images kept in the hub
    List,
    /// Make deltas, so that devices that have an old image fetch little of the new one
    #[command(after_help = "\
Images are files, or hub.internal/NAME:TAG in the hub. Deltas of an image in the hub go beside it, where devices
find them. Elsewhere they go into a new OCI layout, in which the name sha256-HEX, HEX being the digest of the new
image's manifest, stands for them; pushed beside the image under that tag, they are found by every device. A
delta is an OCI artifact that refers to the new image; its layers are checked like any other.

Examples:
  foreshore image delta --from hub.internal/web:1.3 --to hub.internal/web:1.4

  skopeo copy docker://ghcr.io/acme/web:1.3 oci-archive:old.tar
  skopeo copy docker://ghcr.io/acme/web:1.4 oci-archive:new.tar
  foreshore image delta --from old.tar --to new.tar --into deltas
  tag=sha256-$(skopeo inspect --format '{{.Digest}}' oci-archive:new.tar | cut -d: -f2)
  skopeo copy --all oci:deltas:$tag docker://ghcr.io/acme/web:$tag")]
    Delta(Delta),
    /// Remove an image from the hub, unless an app is at it, can go back to it or names it
    #[command(after_help = "\
Example:
  foreshore image remove web:1.3")]
    Remove {
        /// Its name, with or without hub.internal/
        #[arg(value_name = "NAME:TAG")]
        name: String,
    },
}

/// `image delta`.
#[derive(Debug, Args)]
pub(crate) struct Delta {
    /// An image that devices have: hub.internal/NAME:TAG, or an archive or an OCI layout directory, with :NAME where
    /// it holds several; may be given several times
    #[arg(long, required = true, value_name = "IMAGE")]
    pub(crate) from: Vec<String>,
    /// The image that they are to get
    #[arg(long, value_name = "IMAGE")]
    pub(crate) to: String,
    /// The directory to make, or hub.internal/NAME for a repository in the hub. Default: beside --to in the hub
    #[arg(long, value_name = "DIR")]
    pub(crate) into: Option<String>,
    /// Which variant, where the images have several: os/architecture[/variant]. Default: this machine's
    #[arg(long, value_name = "PLATFORM")]
    pub(crate) platform: Option<Platform>,
    /// How hard to compress: a higher level takes more time here and none on the devices
    #[arg(long, default_value_t = 19, value_parser = clap::value_parser!(i32).range(1..=22))]
    pub(crate) level: i32,
}

/// `secret`.
#[derive(Debug, Subcommand)]
pub(crate) enum Secret {
    /// Set a secret, or give it a new value, which goes to the devices that need it
    #[command(after_help = "\
The value is taken as it is, 1 to 4096 bytes; `echo` would add an end of line. It cannot be read back.

Examples:
  printf %s \"$PASSWORD\" | foreshore secret set db-password
  foreshore secret set upload-key --from-file key.pem")]
    Set {
        /// Its name: a-z, 0-9 and '-'
        name: SecretName,
        /// Take the value from this file instead of standard input
        #[arg(long, value_name = "FILE")]
        from_file: Option<PathBuf>,
    },
    /// List secrets, without values, and the apps that use them
    List,
    /// Remove a secret, unless an app uses it
    Remove {
        /// Its name
        name: SecretName,
    },
}

/// `lease`.
#[derive(Debug, Subcommand)]
pub(crate) enum Lease {
    /// List the devices that may switch to another release, and those that wait for their turn, in order
    List,
    /// Write a device off, so that others get its place in its disruption budgets
    #[command(after_help = "\
A device that went dark while it was switching keeps its place, as nobody knows whether it works. Once it is known that
it does, or that it is gone for good, this gives the place to others. When the device is heard of again, it counts again.

Example:
  foreshore lease release gw-3")]
    Release {
        /// The device
        device: DeviceId,
    },
}

/// `device`.
#[derive(Debug, Subcommand)]
pub(crate) enum Device {
    /// Seal a device's secrets to the key that it shows now
    #[command(after_help = "\
The hub trusts the first key that a device shows. One that shows another, because it lost its state or because it is
another device under the same name, gets no secrets until this is run. `foreshore describe device NAME` shows both keys;
`foreshore-agent status` on the device shows its own.

Example:
  foreshore device trust-key gw-3")]
    TrustKey {
        /// The device
        name: DeviceId,
    },
    /// Let no rollout change a device until it is released
    #[command(after_help = "\
What runs there goes on, and what began already ends. Rollouts count it as deferred and go on without it.
A rollback of a change that the device has had still reaches it.

Examples:
  foreshore device hold gw-3 --reason 'recording until Friday'
  foreshore device release gw-3")]
    Hold {
        /// The device
        name: DeviceId,
        /// Why, for other people
        #[arg(long, default_value = "")]
        reason: String,
    },
    /// Let rollouts change a device again
    Release {
        /// The device
        name: DeviceId,
    },
}

fn duration(text: &str) -> Result<Duration, String> {
    let span: Span = text
        .parse()
        .map_err(|error: foreshore_protocol::quantity::ParseQuantityError| error.to_string())?;
    if span.0 == 0 {
        Err("must be above 0".to_owned())
    } else {
        Ok(span.duration())
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    /// The help of a command (`-h`) and of everything below it.
    fn help(command: &mut clap::Command, into: &mut String) {
        into.push_str(&format!(
            "\n──── {} ────\n{}",
            command.get_bin_name().unwrap_or("foreshore").to_owned(),
            command.render_help()
        ));
        for sub in command.get_subcommands_mut() {
            if sub.get_name() != "help" {
                help(sub, into);
            }
        }
    }

    #[test]
    fn every_help_page() {
        let mut command = Arguments::command().term_width(100);
        command.build();
        let mut text = command.render_long_help().to_string();
        help(&mut command, &mut text);
        insta::assert_snapshot!("help", text);
    }

    #[test]
    fn the_command_line_is_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn usual_spellings_are_understood() {
        for line in [
            "get devices",
            "get device gw-1",
            "-o json get apps",
            "get apps -o json",
            "rollout status -w web --timeout 5m",
            "validate -f a -f -",
            "label device gw-1 a=b c-",
            "image import - --name web:1",
            "events -w --device gw-1",
            "secret set db-password --from-file x",
            "secret list -o json",
            "device trust-key gw-1",
            "get budgets",
            "describe budget lines",
            "delete budget lines -y",
            "lease list -o json",
            "lease release gw-1",
        ] {
            let words = std::iter::once("foreshore").chain(line.split(' '));
            assert!(Arguments::try_parse_from(words).is_ok(), "{line}");
        }
        for line in [
            "",
            "get",
            "validate",
            "rollout status web --timeout 5m",
            "rollout status -w web --timeout 0",
            "get devices -o yaml",
            "label device GW a=b",
        ] {
            let words = std::iter::once("foreshore").chain(line.split_whitespace());
            assert!(Arguments::try_parse_from(words).is_err(), "{line}");
        }
    }
}
